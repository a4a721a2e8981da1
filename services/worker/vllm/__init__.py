"""What lives inside vLLM's processes, and how it is started. No vLLM file is changed."""
