"""What a LoRA run needs of a GPU: the frozen base, the adapter with its optimizer, a step's activations and logits."""

from dataclasses import dataclass

from common.sizing.cards import CannotSay
from common.sizing.memory import CONTEXT_BYTES, gib
from common.sizing.shape import Shape

BYTES_PER_TRAINED_WEIGHT = 16
"""The weight, its gradient and Adam's two moments, each in fp32."""
NF4_BYTES_PER_WEIGHT = 0.53
"""4 bits and doubly quantised scales (QLoRA, Dettmers et al. 2023: 0.127 bits a weight for the scales)."""
SURE = 0.9
"""Of a card: what is estimated to need no more of it is taken to fit where there is another way."""
LOGITS_PEAK = 3.0
"""Times the fp32 logits of a micro batch at the peak of a step, measured (docs/log.md)."""


@dataclass(frozen=True)
class Training:
    """One GPU's memory in a run."""

    base_bytes: int
    adapter_bytes: int
    activation_bytes: int
    logits_bytes: int
    fixed_bytes: int = CONTEXT_BYTES

    @property
    def total_bytes(self) -> int:
        """At the peak of a step."""
        return (
            self.base_bytes + self.adapter_bytes + self.activation_bytes + self.logits_bytes + self.fixed_bytes
        )


def lora(shape: Shape, *, four_bit: bool, tokens: int = 1024, rows: int = 1, rank: int = 8) -> Training:
    """A run with gradient checkpointing: one hidden state a layer is kept, one layer's insides are computed again."""
    linear = shape.layers * (shape.attention_weights() + shape.mlp_weights())
    whole = shape.weights_bytes() if shape.quantization else 2 * shape.parameters()
    base = round(linear * NF4_BYTES_PER_WEIGHT) + 2 * (shape.parameters() - linear) if four_bit else whole
    batch = rows * tokens
    kept = shape.layers * batch * shape.hidden * 2
    inside = batch * (3 * shape.intermediate + 8 * shape.hidden) * 2 * 2  # forward and backward of one layer
    logits = round(LOGITS_PEAK * 4 * batch * shape.vocabulary)
    return Training(base, BYTES_PER_TRAINED_WEIGHT * shape.lora_weights(rank), kept + inside, logits)


def choose(
    shape: Shape, memory_bytes: int, *, tokens: int, most: int, four_bit: bool | None = None, rank: int = 8
) -> tuple[bool, int]:
    """(base in 4 bits, rows of `tokens` computed at once) of a run on a card of its own: at most `most` rows.

    `four_bit` None: in 16 bits where they surely fit, for that is how the base is served. Raises CannotSay with what is
    missing when not even one row fits.
    """
    ways = ((four_bit, 1.0),) if four_bit is not None else ((False, SURE), (True, 1.0))
    for bits, share in ways:
        for rows in range(most, 0, -1):
            if lora(shape, four_bit=bits, tokens=tokens, rows=rows, rank=rank).total_bytes <= share * memory_bytes:
                return bits, rows
    least = lora(shape, four_bit=ways[-1][0], tokens=tokens, rank=rank)
    raise CannotSay(
        f"A LoRA run does not fit: the base {gib(least.base_bytes)}{' in 4 bits' if ways[-1][0] else ''}, the adapter "
        f"{gib(least.adapter_bytes)}, activations {gib(least.activation_bytes)} and logits {gib(least.logits_bytes)} "
        f"of one row of {tokens} tokens, CUDA {gib(least.fixed_bytes)} are {gib(least.total_bytes)}; "
        f"{gib(memory_bytes)} are there. Shorter rows (TRAIN_MAX_TOKENS)"
        f"{', a base in 4 bits (TRAIN_FOUR_BIT=auto)' if four_bit is False else ''} or a larger card will help."
    )
