"""The load: prompts made once for all sides, sent by vLLM's own benchmark client, one side after the other in turns."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec

from services.local.errors import UserError
from services.local.plan import ROOT
from services.tools.compare.recipe import Lengths, Recipe, Slo

WORDS = tuple((Path(__file__).parent / "words.txt").read_text().split())
"""Each is one token for most tokenizers, with the blank before it."""
SAMPLING = {"temperature": 0, "ignore_eos": True}
"""The same on every side; an engine that does not take it refuses, and is not compared."""
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
LEAST_MADE = 0.95
"""Of the tokens that were asked for."""
WARM_UP = 4
RUN_TIMEOUT_S = 3600.0
AGREED_PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "The opposite of hot is",
    "Once upon a time",
    "The first ten prime numbers are",
    "To make bread, you need",
    "The moon goes around the",
)
AGREED_TOKENS = 32


class Point(NamedTuple):
    """One load: so many at once, or so many a second."""

    kind: str
    """closed or open."""
    value: float

    def __str__(self) -> str:
        return f"{self.value:g} at once" if self.kind == "closed" else f"{self.value:g} a second"


class Endpoint(NamedTuple):
    """A side, with what its recipe leaves open."""

    shown: str
    base: str
    """Without /v1."""
    model: str
    key: str


def points(recipe: Recipe) -> list[Point]:
    """The loads, in order."""
    return [*(Point("closed", value) for value in recipe.closed), *(Point("open", value) for value in recipe.open)]


def requests(recipe: Recipe, point: Point) -> int:
    """How many are sent in a round: few take long, one after the other; many at once need two each."""
    if point.kind == "open":
        return recipe.requests
    at_once = int(point.value)
    return max(2 * at_once, min(recipe.requests, 8 * at_once))


def prompts(lengths: Lengths, count: int, seed: int) -> list[dict[str, object]]:
    """Rows of vLLM's `custom` dataset, the same for the same seed. Raises UserError for a trace that cannot be read."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    recorded = _recorded(Path(lengths.trace)) if lengths.trace else []
    rows: list[dict[str, object]] = []
    for number in range(count):
        if recorded:
            read, made = recorded[(seed * count + number) % len(recorded)]
        else:
            low, high = 1 - lengths.spread, 1 + lengths.spread
            read, made = (
                max(1, round(mean * draw.uniform(low, high))) for mean in (lengths.prompt_tokens, lengths.answer_tokens)
            )
        rows.append({"prompt": " ".join(draw.choices(WORDS, k=read)), "output_tokens": made})
    return rows


def _recorded(path: Path) -> list[tuple[int, int]]:
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        found = [(max(1, int(line["prompt_tokens"])), max(1, int(line["completion_tokens"]))) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: a trace is JSONL with prompt_tokens and completion_tokens ({type(error).__name__}: {error})"
        ) from error
    if not found:
        raise UserError(f"{path}: there is no request in this trace.")
    return found


def run(
    side: Endpoint, point: Point, rows: Sequence[Mapping[str, object]], slo: Slo, tokenizer: str, folder: Path
) -> dict[str, Any]:
    """One round: what `vllm bench serve` says of it. Raises UserError when it fails."""
    data, out = folder / "prompts.jsonl", folder / "result.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.unlink(missing_ok=True)
    told = [*_client(side, point, slo), "--tokenizer", tokenizer, "--dataset-path", str(data)]
    told += ["--num-prompts", str(len(rows)), "--num-warmups", str(min(WARM_UP, len(rows)))]
    told += ["--save-result", "--result-dir", str(folder), "--result-filename", out.name]
    env = os.environ | {"OPENAI_API_KEY": side.key, "HF_HUB_OFFLINE": "1"} | QUIET
    try:
        ran = subprocess.run(
            told, cwd=ROOT, env=env, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{side.shown}: {point} was not done after {RUN_TIMEOUT_S:.0f} s") from error
    if ran.returncode or not out.exists():
        tail = "\n".join((ran.stderr or ran.stdout).strip().splitlines()[-5:])
        raise UserError(f"{side.shown}: vllm bench serve failed:\n{tail}")
    found: dict[str, Any] = msgspec.json.decode(out.read_bytes())
    asked = sum(int(str(row["output_tokens"])) for row in rows)
    if not found["failed"] and found["total_output_tokens"] < LEAST_MADE * asked:
        raise UserError(
            f"{side.shown} made {found['total_output_tokens']} tokens where {asked} were asked for: it ends answers "
            "early whatever it is told, and its figures beside the others' would say nothing."
        )
    return found


def _client(side: Endpoint, point: Point, slo: Slo) -> list[str]:
    """vLLM's benchmark client for one side and load. https://docs.vllm.ai/en/latest/cli/bench/serve.html"""
    closed = point.kind == "closed"
    return [
        sys.executable, "-m", "services.tools.compare.client", "--disable-tqdm",
        "--backend", "openai", "--base-url", side.base, "--endpoint", "/v1/completions", "--model", side.model,
        "--dataset-name", "custom", "--custom-output-len", "-1", "--skip-chat-template",
        "--extra-body", json.dumps(SAMPLING), "--header", "cache-control=no-store",
        "--goodput", f"ttft:{slo.ttft_ms}", f"tpot:{slo.tpot_ms}",
        "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,95,99",
        *(["--max-concurrency", f"{point.value:.0f}"] if closed else ["--request-rate", str(point.value)]),
    ]  # fmt: skip


def _headers(side: Endpoint) -> dict[str, str]:
    return {"authorization": f"Bearer {side.key}", "cache-control": "no-store"}


def greedy(side: Endpoint) -> list[str]:
    """Its answers to AGREED_PROMPTS. Raises UserError when it refuses: nothing that it is asked is optional."""
    said = []
    with httpx.Client(base_url=side.base, headers=_headers(side), timeout=600) as http:
        for prompt in AGREED_PROMPTS:
            asked = {"model": side.model, "prompt": prompt, "max_tokens": AGREED_TOKENS, **SAMPLING}
            try:
                answer = http.post("/v1/completions", json=asked)
            except httpx.HTTPError as error:
                raise UserError(f"{side.shown}: {side.base} does not answer ({type(error).__name__})") from error
            if not answer.is_success:
                raise UserError(
                    f"{side.shown} refuses what the others are asked: {answer.status_code} {answer.text[:300]}"
                )
            said.append(str(answer.json()["choices"][0]["text"]))
    return said
