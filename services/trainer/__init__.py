"""Trains LoRA adapters from a user's examples: what a row means, how it is rendered, one run, the queue of runs."""
