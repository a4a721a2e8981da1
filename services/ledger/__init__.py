"""Adds up what requests used and the machine costs, and says how the stack is doing (`/v1/status`, `/v1/usage`)."""
