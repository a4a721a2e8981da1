"""A model's shape, from its config.json: what its weights and its KV blocks weigh, in bytes and in parameters."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import formats
from common.sizing.cards import CannotSay

GATED_DECODERS = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
})
"""Decoders of one build: attention with q, k, v, o; a gated MLP; two norms a layer. Others look alike and differ."""
KNOWN = json.loads((Path(__file__).parent / "known.json").read_text())
"""config.json of the models that the documents name, so that a plan needs no download."""
VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to it (ParallelLMHead)."""
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Shape:
    """A decoder with a gated MLP."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_tokens: int
    """The longest sequence the model was made for."""
    tied: bool
    """Whether the output matrix is the input's."""
    qkv_bias: bool
    head_norms: bool
    quantization: str = ""
    """awq, gptq or w4a16 (4 bits), w8a8, w8a16 or fp8, or empty."""
    group: int = 128
    """Weights of 4 bits that share a scale."""

    def attention_weights(self, tp: int = 1) -> int:
        """Weights of q, k, v and o of one layer on one of `tp` GPUs; KV heads are copied where there are too few."""
        per_gpu = self.heads // tp * self.head_dim * self.hidden
        return 2 * per_gpu + 2 * self._kv_heads(tp) * self.head_dim * self.hidden

    def mlp_weights(self, tp: int = 1) -> int:
        """Weights of the MLP of one layer on one of `tp` GPUs."""
        return 3 * self.hidden * self.intermediate // tp

    def _kv_heads(self, tp: int) -> int:
        return max(1, self.kv_heads // tp)

    def weights_bytes(self, tp: int = 1) -> int:
        """What vLLM holds of the model on one of `tp` GPUs, in half precision unless it is quantised."""
        linear = self.layers * (self.attention_weights(tp) + self.mlp_weights(tp))
        padded = -(-self.vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        tables = (1 if self.tied else 2) * padded // tp * self.hidden
        return 2 * (tables + self._small(tp)) + round(linear * self._bytes_per_weight())

    def _small(self, tp: int = 1) -> int:
        """Norms and biases."""
        layer = 2 * self.hidden
        if self.qkv_bias:
            layer += (self.heads // tp + 2 * self._kv_heads(tp)) * self.head_dim
        if self.head_norms:
            layer += 2 * self.head_dim
        return self.layers * layer + self.hidden

    def _bytes_per_weight(self) -> float:
        if self.quantization in formats.FOUR_BIT:  # 4 bits, and a half-precision scale and a 4-bit zero for each group
            return 0.5 + (2 + 0.5) / (self.group if self.group > 0 else self.hidden)
        return 1.0 if self.quantization else 2.0

    def kv_bytes_per_token(self, tp: int = 1, value_bytes: int = 2) -> int:
        """Keys and values of one token in all layers, on one of `tp` GPUs."""
        return 2 * self.layers * self._kv_heads(tp) * self.head_dim * value_bytes

    def parameters(self) -> int:
        """As the model's page counts them: without padding."""
        linear = self.layers * (self.attention_weights() + self.mlp_weights())
        return linear + (1 if self.tied else 2) * self.vocabulary * self.hidden + self._small()

    def active_weights(self) -> int:
        """Weights that every token is multiplied with: all but the input's table."""
        return self.layers * (self.attention_weights() + self.mlp_weights()) + self.vocabulary * self.hidden

    def lora_weights(self, rank: int, tp: int = 1) -> int:
        """One adapter's place in vLLM on one of `tp` GPUs: A whole, B split, for each linear layer of every block."""
        q, kv = self.heads // tp * self.head_dim, self._kv_heads(tp) * self.head_dim
        inner = self.intermediate // tp
        a = 3 * self.hidden + q + 2 * self.hidden + inner  # q, k, v; o; gate, up; down
        b = q + 2 * kv + self.hidden + 2 * inner + self.hidden
        return self.layers * rank * (a + b)


def read(model: str) -> Shape:
    """The shape of a checkpoint folder or of a model that is known by name. Raises CannotSay."""
    folder = Path(model)
    if (folder / "config.json").is_file():
        return of_config(json.loads((folder / "config.json").read_text()), model)
    name = model.partition("@")[0]
    if name in KNOWN:
        return of_config(KNOWN[name], name)
    raise CannotSay(f"The config.json of {model} is not on this machine. Known without it: {', '.join(sorted(KNOWN))}; "
                    "or give a checkpoint folder.")


def of_config(config: Mapping[str, Any], model: str) -> Shape:
    """The shape that a config.json describes. Raises CannotSay for an architecture whose arithmetic is not here."""
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in GATED_DECODERS:
        raise CannotSay(f"{model} is a {architecture}; its arithmetic is not in common/sizing/shape.py. "
                        f"Known: {', '.join(sorted(GATED_DECODERS))}.")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        method, group = _quantization(config, model)
        return Shape(
            architecture=architecture, layers=int(config["num_hidden_layers"]), hidden=hidden,
            intermediate=int(config["intermediate_size"]), heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads), vocabulary=int(config["vocab_size"]),
            max_tokens=int(config["max_position_embeddings"]), tied=bool(config.get("tie_word_embeddings")),
            qkv_bias=architecture == "Qwen2ForCausalLM" or bool(config.get("attention_bias")),
            head_norms=architecture == "Qwen3ForCausalLM", quantization=method, group=group,
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CannotSay):
            raise
        raise CannotSay(f"The config.json of {model} lacks {error}.") from error


def _quantization(config: Mapping[str, Any], model: str) -> tuple[str, int]:
    """(method, weights that share a scale)."""
    if not config.get("quantization_config"):
        return "", 128
    found = formats.of(config)
    if found.name in formats.FOUR_BIT and found.bits != 4:
        raise CannotSay(f"{model} is {found.name} with {found.bits} bits; only 4 are known here.")
    if found.name not in formats.FOUR_BIT and found.bits != 8:
        raise CannotSay(f"{model} is quantised by {found.name!r}, whose sizes are not known here "
                        "(awq, gptq, fp8 and compressed-tensors with 4 or 8 bits are).")
    return found.name, found.group
