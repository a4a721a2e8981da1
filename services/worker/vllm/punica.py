"""LoRA on vLLM's CPU platform, computed per adapter instead of per token.

vLLM 0.32's own CPU wrapper gathers an adapter's matrices once for every token, also for requests that use none: a base
model with LoRA enabled loses much of its speed, and index -1 ("no adapter") gathers the last slot's weights
(docs/decisions/0006). Here a step's tokens are grouped by adapter once; each group is two small matrix products.

    y[rows] += (x[rows] @ A.T) @ B.T * scale        for each adapter that has rows in this step
"""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Group = tuple[int, torch.Tensor | None]
"""An adapter's slot, and the rows that use it; None: all of them."""


class GroupedPunica(PunicaWrapperCPU):  # type: ignore[misc]  # untyped
    """The wrapper vLLM's LoRA layers call, one for a model. Interface: vllm/lora/punica_wrapper/punica_base.py."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokens: list[Group] = []
        self._sampled: list[Group] = []

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._tokens = groups(self.token_lora_indices)
        self._sampled = groups(self.sampler_indices)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """x: [tokens, in]; y: [tokens, sum(output_slices)], changed; A: [slots, 1, r, in]; B: [slots, 1, out, r]."""
        for slot, rows in self._tokens:
            some = x if rows is None else x[rows]
            at = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                _add(y[:, at : at + width], rows, some, a[slot, 0], b[slot, 0], scale)
                at += width

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """As add_lora_linear, for the sampled tokens and the vocabulary."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for slot, rows in self._sampled:
            _add(y, rows, x if rows is None else x[rows], lora_a_stacked[slot, 0], lora_b_stacked[slot, 0], scale)


def groups(indices: torch.Tensor) -> list[Group]:
    """The slots in `indices` ([tokens], -1: no adapter) with their rows."""
    slots = [slot for slot in indices.unique().tolist() if slot >= 0]
    if len(slots) == 1 and bool((indices == slots[0]).all()):
        return [(slots[0], None)]
    return [(slot, (indices == slot).nonzero().view(-1)) for slot in slots]


def _add(
    y: torch.Tensor, rows: torch.Tensor | None, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> None:
    delta = (x.to(a.dtype) @ a.t()) @ b.t()
    if scale != 1.0:
        delta *= scale
    width = min(y.shape[1], delta.shape[1])  # a padded vocabulary
    if rows is None:
        y[:, :width] += delta[:, :width]
    else:
        y[:, :width].index_add_(0, rows, delta[:, :width].to(y.dtype))
