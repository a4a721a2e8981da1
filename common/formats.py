"""How a checkpoint's weights are stored, as people call it: bf16, w8a8, w4a16, awq, gptq, fp8."""

from collections.abc import Mapping
from typing import Any, NamedTuple

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
FOUR_BIT = frozenset({"awq", "gptq", "w4a16"})


class Format(NamedTuple):
    """What config.json says."""

    name: str
    bits: int
    """Of a weight in a linear layer."""
    group: int = 128
    """Weights that share a scale, where a weight has 4 bits; -1: all of a column."""


def of(config: Mapping[str, Any]) -> Format:
    """The format. One that is not known has its method's name and 16 bits."""
    said = config.get("quantization_config") or {}
    method = str(said.get("quant_method") or "")
    if method == "compressed-tensors":
        return _compressed(said)
    if method in FOUR_BIT:
        return Format(method, int(said.get("bits") or said.get("w_bit") or 4), int(said.get("group_size") or 128))
    if method:
        return Format(method, 8 if method == "fp8" else 16)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
    return Format(DTYPES.get(dtype, dtype), 32 if dtype == "float32" else 16)


def _compressed(said: Mapping[str, Any]) -> Format:
    """Schemes by groups of layers; the first is that of nearly all (github.com/vllm-project/compressed-tensors)."""
    scheme: Mapping[str, Any] = next(iter((said.get("config_groups") or {}).values()), {})
    weights, inputs = scheme.get("weights") or {}, scheme.get("input_activations") or {}
    bits = int(weights.get("num_bits") or 16)
    if weights.get("type") == "float":
        return Format(f"fp{bits}", bits)
    return Format(f"w{bits}a{inputs.get('num_bits') or 16}", bits, int(weights.get("group_size") or 128))
