"""vLLM's CUDA build shown our command lines, on a machine without a GPU: `make check-cuda`."""
