"""A worker: vLLM, the agent that starts and announces it, and the middleware inside it."""
