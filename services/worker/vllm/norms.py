"""RMSNorm on vLLM's CPU platform by the kernel that its build holds (csrc/cpu/layernorm.cpp), not by ten operators.

vLLM 0.32 leaves it to torch.compile there; we run eager (docs/decisions/0003), where each of two norms a layer is such
a chain: with one request more time than the matrix products take (docs/decisions/0017). SwiGLU stays as it is: that
kernel is slower than the chain.

    rms_norm(x) = x / sqrt(mean(x²) + ε) · w
"""

import torch
from vllm.model_executor.layers.layernorm import RMSNorm


def put_in_place() -> None:
    """For all layers that are made from now on."""
    RMSNorm.forward_cpu = rms_norm


def rms_norm(
    layer: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x: [tokens, width]. With `residual`, of the same shape, both are changed: x + residual becomes the residual."""
    weight = layer.weight.data
    plain = layer.has_weight and layer.variance_size_override is None and weight.dtype == x.dtype
    if not plain or not x.is_contiguous():
        return layer.forward_native(x, residual)
    if residual is None:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, layer.variance_epsilon)
        return out
    torch.ops._C.fused_add_rms_norm(x, residual, weight, layer.variance_epsilon)
    return x, residual
