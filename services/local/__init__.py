"""The same stack as compose.yaml, as plain processes: no Docker, no root, no GPU."""
