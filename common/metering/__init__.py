"""Sees what a request cost: one ASGI class, mounted at the worker and in the relay."""
