"""A quantised copy of a checkpoint, by llm-compressor, in an environment of its own (install.sh beside this file):

    python services/tools/quantize/compress.py METHOD MODEL REVISION TEXTS OUT

METHOD   w8a8: 8-bit weights and activations, SmoothQuant, a scale a channel and a token
         gptq: 4-bit weights, symmetric, in groups (https://arxiv.org/abs/2210.17323)
         awq:  4-bit weights, asymmetric, in groups, activation-aware (https://arxiv.org/abs/2306.00978)
TEXTS    JSONL: {"text": "…"} or {"messages": […]} a line, to calibrate with
OUT      the folder to make; nothing of it is there before all is

Imports nothing of ours: its packages are others than the stack's. Prints one JSON object: how it was made.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    preset_name_to_scheme,
)
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

KEPT = ["lm_head"]
"""Layers that stay as they are: the last decides between words, and is the embedding in many small models."""
GROUPS = (128, 64, 32)
SAMPLES, TOKENS = (128, 512) if torch.cuda.is_available() else (32, 256)
"""Calibration: so many texts at most, of so many tokens at most. AWQ tries each layer twenty times."""
SMOOTHING = 0.8


def group_size(widths: set[int]) -> int:
    """The largest group that divides every layer's input. Raises SystemExit when none does."""
    for size in GROUPS:
        if all(width % size == 0 for width in widths):
            return size
    sys.exit(
        f"quantize: no group of {GROUPS} divides the widths of this model's layers ({sorted(widths)}); METHOD=w8a8 can"
    )


def recipe(method: str, model: Any) -> tuple[list[Any], dict[str, object]]:
    """llm-compressor's modifiers, and what the card says of them."""
    if method == "w8a8":
        scheme = preset_name_to_scheme("W8A8", ["Linear"])
        return (
            [
                SmoothQuantModifier(smoothing_strength=SMOOTHING),
                QuantizationModifier(config_groups={"group_0": scheme}, ignore=KEPT),
            ],
            {
                "weights": "int8, symmetric, a scale a channel",
                "activations": "int8, symmetric, a scale a token",
                "smoothing": SMOOTHING,
            },
        )
    widths = {
        layer.in_features
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name not in KEPT
    }
    size, symmetric = group_size(widths), method == "gptq"
    weights = QuantizationArgs(
        num_bits=4, type=QuantizationType.INT, strategy=QuantizationStrategy.GROUP, group_size=size, symmetric=symmetric
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    said: dict[str, object] = {
        "weights": f"int4, {'' if symmetric else 'a'}symmetric, groups of {size}",
        "activations": "as they were",
    }
    if method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=KEPT)], said
    return [AWQModifier(duo_scaling=True), QuantizationModifier(config_groups=groups, ignore=KEPT)], said


def tokens(tokenizer: Any, path: Path) -> list[list[int]]:
    """The texts as the model will see them, cut to TOKENS."""
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "messages" in row:
            ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        else:
            ids = tokenizer(row["text"])["input_ids"]
        found.append(list(ids)[:TOKENS])
    return found[:SAMPLES]


def main(method: str, source: str, revision: str, texts: Path, out: Path) -> None:
    """The whole way."""
    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda self, *_, **__: None  # it pins memory for a GPU that is not there
    model = AutoModelForCausalLM.from_pretrained(source, revision=revision or None, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or None)
    ids = tokens(tokenizer, texts)
    modifiers, said = recipe(method, model)
    data = Dataset.from_list([{"input_ids": one, "attention_mask": [1] * len(one)} for one in ids])
    oneshot(model=model, recipe=modifiers, dataset=data, max_seq_length=TOKENS, num_calibration_samples=len(ids))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, save_compressed=True)
    tokenizer.save_pretrained(partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # the engine may run as another user
    partial.rename(out)
    print(json.dumps(said | {"calibration": f"{len(ids)} texts, {sum(map(len, ids))} tokens"}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
