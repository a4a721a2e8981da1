"""What GPUs and host do, as Prometheus metrics: NVML through nvidia-ml-py, the host through psutil."""
