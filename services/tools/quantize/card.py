"""What lies beside a quantised checkpoint's weights: `quantised.json` for programs, README.md for people."""

import json
import time
from pathlib import Path
from typing import Any

import msgspec

from common.checkpoint import MADE
from common.files import write_whole
from services.tools.quantize.gate import Verdict

NAMES = {
    "w8a8": "8-bit weights and activations (SmoothQuant)",
    "gptq": "4-bit weights (GPTQ)",
    "awq": "4-bit weights (AWQ)",
}


def made(folder: Path, original: str, revision: str, method: str, how: dict[str, Any], digest: str) -> None:
    """Say of what the weights were made, before anything is served."""
    said = {
        "original": original,
        "revision": revision,
        "method": method,
        "made": how,
        "digest": digest,
        "at": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    write_whole([json.dumps(said, indent=1).encode() + b"\n"], folder / MADE)


def measured(folder: Path, verdict: Verdict, name: str) -> None:
    """Add what the gate found, and write the card."""
    said = json.loads((folder / MADE).read_text()) | {"gate": msgspec.to_builtins(verdict)}
    write_whole([json.dumps(said, indent=1).encode() + b"\n"], folder / MADE)
    write_whole([text(said, verdict, name).encode()], folder / "README.md")


def text(said: dict[str, Any], verdict: Verdict, name: str) -> str:
    """The model card."""
    was, now = verdict.original, verdict.quantised
    rows = [
        ("perplexity", f"{was.perplexity:.2f}", f"{now.perplexity:.2f} ({verdict.loss:+.1%})"),
        ("weights", f"{was.size_bytes / 1e6:.0f} MB", f"{now.size_bytes / 1e6:.0f} MB"),
        ("ready after", f"{was.load_s:.0f} s", f"{now.load_s:.0f} s"),
        *(
            (f"tokens/s, {at} at once", f"{was.tokens_per_s[at]:.0f}", f"{now.tokens_per_s[at]:.0f}")
            for at in was.tokens_per_s
        ),
    ]
    table = "\n".join(f"| {what} | {before} | {after} |" for what, before, after in rows)
    how = "\n".join(f"- {what}: {value}" for what, value in said["made"].items())
    base = said["original"] + (f"@{said['revision']}" if said["revision"] else "")
    return f"""---
base_model: {said["original"]}
tags: [{said["method"]}, compressed-tensors, vllm]
---
# {name}

{NAMES[said["method"]]} of `{base}`,
made by OwnGPT's `make quantize` on {said["at"]} with llm-compressor. The licence is the original's.

{how}
- kept in 16 bits: lm_head

Measured by vLLM, one after the other on the same machine, on {verdict.measured_tokens} tokens that were not
calibrated with:

| | original | quantised |
|---|---|---|
{table}

KL divergence of next-token distributions: at least {verdict.kl_nats:.4f} nats. The likeliest token is the same at
{verdict.top1_agreement:.1%} of the positions; {verdict.same_answers:.0%} of the greedy answers are the same to the end.
"""
