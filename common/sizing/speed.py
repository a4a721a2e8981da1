"""A roofline: a step takes as long as reading what it needs from memory, or as its arithmetic, whichever is longer."""

from common.sizing.cards import Card
from common.sizing.shape import Shape

BANDWIDTH_SHARE = 0.7
"""Of the data sheet's bandwidth that a decode step reaches. Assumed, not measured here."""
FLOPS_SHARE = 0.5
"""Of the data sheet's throughput that prefill reaches. Assumed, not measured here."""
SPLIT_SHARE = 0.85
"""What is left of the speed when a model is split over GPUs, for the exchange after each half layer. Assumed."""


def decode_tokens_per_s(shape: Shape, card: Card, *, gpus: int = 1, together: int = 1, tokens: int = 1024) -> float:
    """New tokens per second of `together` sequences that are `tokens` long, all of them added up."""
    read_bytes = shape.weights_bytes(gpus) - (0 if shape.tied else shape.vocabulary // gpus * shape.hidden * 2)
    read_bytes += together * tokens * shape.kv_bytes_per_token(gpus)
    memory_s = read_bytes / (card.bandwidth_bytes_per_s * BANDWIDTH_SHARE)
    flops_s = 2 * shape.active_weights() * together / gpus / (card.flops_per_s * FLOPS_SHARE)
    return together / max(memory_s, flops_s) * _split(gpus)


def prefill_tokens_per_s(shape: Shape, card: Card, *, gpus: int = 1, tokens: int = 1024) -> float:
    """Prompt tokens per second of prompts that are `tokens` long."""
    attention = 2 * shape.layers * shape.heads * shape.head_dim * tokens  # causal: half of 4 x tokens
    return card.flops_per_s * FLOPS_SHARE * gpus / (2 * shape.active_weights() + attention) * _split(gpus)


def _split(gpus: int) -> float:
    return 1.0 if gpus == 1 else SPLIT_SHARE
