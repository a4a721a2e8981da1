"""How vLLM deals out a GPU's memory: weights, what a step needs, LoRA's places, and the rest as KV blocks.

Weights, LoRA's places and bytes per block are arithmetic, and equal to vLLM's own (docs/hosts.md has the comparison).
What a step needs, the CUDA context and the graphs are estimates: nothing here has been measured on a GPU.
"""

from dataclasses import dataclass

from common.sizing.cards import MIB, CannotSay, Card
from common.sizing.shape import Shape

BLOCK_TOKENS = 16
CONTEXT_BYTES = 600 * MIB
"""CUDA context and libraries, counted by vLLM as used before anything is loaded. Estimate."""
GRAPHS_BYTES = 600 * MIB
"""CUDA graphs of the usual batch sizes. Estimate."""
ASLEEP_BYTES = CONTEXT_BYTES + GRAPHS_BYTES
"""What an engine that sleeps (level 1) keeps of its card. Estimate."""
SAMPLER_BYTES_PER_LOGIT = 24
"""Logits in fp32, sorted values and indices, probabilities and their sums, at the profiled peak. Estimate."""
LEAST_SEQUENCE_TOKENS = 2048
"""A model that cannot hold one chat of this length is of no use."""


@dataclass(frozen=True)
class Serving:
    """How one model is to be served by one worker."""

    gpus: int = 1
    """Over which its weights are split (tensor parallel)."""
    utilization: float = 0.90
    """Share of each GPU's memory that the engine may take."""
    max_tokens: int = 0
    """Longest sequence; 0: the longest that fits, at most the model's own."""
    sequences: int = 0
    """Run at once; 0: vLLM's default for the card."""
    loras: int = 4
    """Different adapters in one step; 0: none can be served."""
    lora_rank: int = 16


@dataclass(frozen=True)
class Memory:
    """One GPU's memory, as one worker uses it."""

    total_bytes: int
    weights_bytes: int
    step_bytes: int
    lora_bytes: int
    fixed_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    kv_blocks: int
    max_tokens: int
    """Longest sequence that can be served."""
    sequences: int
    """Run at once at most, however short."""

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit."""
        return self.kv_blocks * BLOCK_TOKENS

    def together(self, tokens: int) -> float:
        """How many sequences of this length fit at once."""
        return min(float(self.sequences), self.kv_blocks / -(-tokens // BLOCK_TOKENS))


USUAL_SEQUENCES = 256


def step_tokens(card: Card) -> int:
    """Tokens in one step, prefill and decode together: vLLM's default for the card (`max_num_batched_tokens`)."""
    return 8192 if card.many_at_once else 2048


def sequences(card: Card, asked: int = 0) -> int:
    """Sequences at once: as asked, else vLLM's default for the card (`max_num_seqs`)."""
    return asked or (1024 if card.many_at_once else USUAL_SEQUENCES)


def serve(shape: Shape, card: Card, how: Serving) -> Memory:
    """Deal out the memory. Raises CannotSay with the number that is missing when the model does not fit."""
    if shape.heads % how.gpus:
        fit = ", ".join(str(n) for n in (1, 2, 4, 8) if not shape.heads % n)
        raise CannotSay(f"{shape.heads} attention heads cannot be split over {how.gpus} GPUs; over {fit} they can.")
    if how.max_tokens > shape.max_tokens:
        raise CannotSay(f"{how.max_tokens} tokens are more than the {shape.max_tokens} the model was made for.")
    count = sequences(card, how.sequences)
    weights = shape.weights_bytes(how.gpus)
    hidden = step_tokens(card) * (3 * shape.intermediate // how.gpus + 4 * shape.hidden) * 2
    step = hidden + count * shape.vocabulary * SAMPLER_BYTES_PER_LOGIT
    lora = 2 * how.loras * shape.lora_weights(how.lora_rank, how.gpus)
    fixed = CONTEXT_BYTES + GRAPHS_BYTES
    kv = int(card.memory_bytes * how.utilization) - weights - step - lora - fixed
    per_token = shape.kv_bytes_per_token(how.gpus)
    blocks = max(0, kv // (per_token * BLOCK_TOKENS))
    least = how.max_tokens or min(LEAST_SEQUENCE_TOKENS, shape.max_tokens)
    if blocks * BLOCK_TOKENS < least:
        missing = least * per_token - max(0, kv) + (-kv if kv < 0 else 0)
        raise CannotSay(
            f"It does not fit: weights {gib(weights)}, a step {gib(step)}, LoRA {gib(lora)}, CUDA {gib(fixed)} of "
            f"{how.utilization:.0%} of {gib(card.memory_bytes)} leave {gib(kv)} for KV blocks; one sequence of {least} "
            f"tokens needs {gib(least * per_token)}: {gib(missing)} are missing."
        )
    longest = how.max_tokens or min(shape.max_tokens, blocks * BLOCK_TOKENS)
    return Memory(card.memory_bytes, weights, step, lora, fixed, kv, per_token, blocks, longest, count)


def gib(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:.1f} GiB"
