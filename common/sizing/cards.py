"""GPUs by what limits a language model on them: memory, its bandwidth, matrix throughput, power.

The numbers are the makers' data sheets': dense (no sparsity) bf16 with fp32 accumulation, fp16 where a card has no
bf16. `memory_bytes` is what NVML reports, which is less than the name says where the card keeps some for ECC.
"""

from dataclasses import dataclass, replace

MIB = 1 << 20
MIN_DRIVER = 580
"""CUDA 13.0, with which the pinned vLLM wheel was built, needs this driver (its release notes, table 3)."""


class CannotSay(ValueError):
    """A number that cannot be worked out; the message says what is missing."""


@dataclass(frozen=True)
class Card:
    """One model of GPU."""

    name: str
    """Short, as people write it; also in prices.yaml."""
    nvml: tuple[str, ...]
    """How its name in NVML begins."""
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: float
    """Multiplications and additions, each counted, in half precision."""
    power_watts: int
    capability: tuple[int, int]

    @property
    def many_at_once(self) -> bool:
        """Whether vLLM takes its larger defaults (8,192 tokens a step, 1,024 sequences): 70 GiB, and no A100."""
        return self.memory_bytes >= 70 * 1024 * MIB and "a100" not in self.name.lower()


def _card(
    name: str, nvml: str, mib: int, gb_per_s: float, tflops: float, watts: int, capability: tuple[int, int]
) -> Card:
    return Card(name, tuple(nvml.split("|")), mib * MIB, gb_per_s * 1e9, tflops * 1e12, watts, capability)


CARDS = (
    _card("T4", "Tesla T4|NVIDIA T4", 15360, 320, 65, 70, (7, 5)),
    _card("RTX 3090", "NVIDIA GeForce RTX 3090", 24576, 936, 71, 350, (8, 6)),
    _card("RTX 4090", "NVIDIA GeForce RTX 4090", 24564, 1008, 165.2, 450, (8, 9)),
    _card("RTX 5090", "NVIDIA GeForce RTX 5090", 32607, 1792, 209.5, 575, (12, 0)),
    _card("A10G", "NVIDIA A10G", 23028, 600, 70, 300, (8, 6)),
    _card("A10", "NVIDIA A10", 23028, 600, 125, 150, (8, 6)),
    _card("L4", "NVIDIA L4", 23034, 300, 121, 72, (8, 9)),
    _card("L40S", "NVIDIA L40S", 46068, 864, 362, 350, (8, 9)),
    _card("RTX A6000", "NVIDIA RTX A6000", 49140, 768, 154.8, 300, (8, 6)),
    _card("A100-40", "NVIDIA A100-SXM4-40GB|NVIDIA A100-PCIE-40GB", 40960, 1555, 312, 400, (8, 0)),
    _card("A100-80", "NVIDIA A100-SXM4-80GB|NVIDIA A100 80GB PCIe|NVIDIA A100-SXM-80GB", 81920, 1935, 312, 400, (8, 0)),
    _card("H100", "NVIDIA H100 80GB HBM3", 81559, 3350, 989, 700, (9, 0)),
    _card("H100 PCIe", "NVIDIA H100 PCIe", 81559, 2000, 756, 350, (9, 0)),
    _card("H200", "NVIDIA H200", 143771, 4800, 989, 700, (9, 0)),
    _card("B200", "NVIDIA B200", 183359, 8000, 2250, 1000, (10, 0)),
)


def of_memory(card: Card, memory_bytes: int) -> Card:
    """The same card with the memory that the driver says it has."""
    return replace(card, memory_bytes=memory_bytes)


def find(name: str) -> Card:
    """The card called so, as people or NVML call it. Raises CannotSay with those that are known."""
    plain = name.lower().replace(" ", "").replace("-", "")
    for card in CARDS:
        if card.name.lower().replace(" ", "").replace("-", "") == plain or name in card.nvml:
            return card
    prefixed = [card for card in CARDS for prefix in card.nvml if name.startswith(prefix + " ")]
    if prefixed:
        return prefixed[0]
    known = ", ".join(card.name for card in CARDS)
    raise CannotSay(f"No data sheet of a GPU called {name!r} is in common/sizing/cards.py. Known: {known}.")
