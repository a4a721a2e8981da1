"""What a run is told (`plan.json`), what `auto` means, and where its files are."""

import json
import math
import os
from pathlib import Path
from typing import Literal

import msgspec

from common.files import replace

STEPS_AIMED_AT = 180
EPOCHS = (3, 10)
VALIDATION_SHARE = 0.1
VALIDATION_ROWS = (5, 200)
PATIENCE_EVALS = 3
MAX_LOGITS_BYTES = 512 * 1024 * 1024
MAX_STEPS_BETWEEN_CHECKPOINTS = 200
DATA_AT_FAULT, PAUSED = 3, 75
"""How a run's process ends when it is not 0."""
COMPLETE = "complete"
"""The file that says a checkpoint folder was written to its end."""


class Lora(msgspec.Struct, frozen=True):
    """PEFT's LoraConfig. Ranks are vLLM's: 8 or 16."""

    r: Literal[8, 16] = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: str = "all-linear"


class Plan(msgspec.Struct, frozen=True):
    """One run. Paths are the trainer's; `auto` is still in the hyperparameters."""

    job: str
    base: str
    training_file: str
    seed: int
    validation_file: str | None = None
    n_epochs: int | Literal["auto"] = "auto"
    batch_size: int | Literal["auto"] = "auto"
    learning_rate_multiplier: float | Literal["auto"] = "auto"
    max_tokens: int = 1024
    lora: Lora = Lora()
    revision: str = ""
    """Of a base from the hub; empty: main."""
    four_bit: bool | Literal["auto"] = False
    """Load the base in 4 bits (bitsandbytes, GPU only); auto: where 16 do not fit."""
    gpu: bool = False
    """Whether it has a GPU to train on."""
    micro_batch: int = 8
    """Rows computed at once, at most; the rest of a batch is accumulated."""


class Hyperparameters(msgspec.Struct, frozen=True):
    """What `auto` became."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


def resolve(plan: Plan, rows: int) -> Hyperparameters:
    """Numbers for `auto`, from the count of training rows: batches of a 40th, some hundred steps in 3 to 10 epochs."""
    batch = plan.batch_size if plan.batch_size != "auto" else min(16, max(1, 2 ** round(math.log2(max(1, rows / 40)))))
    steps = -(-rows // batch)
    epochs = plan.n_epochs if plan.n_epochs != "auto" else min(EPOCHS[1], max(EPOCHS[0], round(STEPS_AIMED_AT / steps)))
    multiplier = plan.learning_rate_multiplier if plan.learning_rate_multiplier != "auto" else 1.0
    return Hyperparameters(epochs, batch, multiplier)


def rows_on_gpu(most: int, vocabulary: int, tokens: int) -> int:
    """Rows computed at once on a GPU, whose memory the logits would fill: fp32, vocabulary x tokens a row, and as much
    again for their gradient. Llama-3 (128,256): one row of 1,024 tokens; Mistral (32,768): four."""
    return max(1, min(most, MAX_LOGITS_BYTES // (4 * vocabulary * tokens)))


def learning_rate(hidden_size: int, multiplier: float) -> float:
    """LoRA's learning rate: ten times what full fine-tuning takes, and smaller the wider the model.

    SmolLM2-135M (576): 1.3e-3; Llama-3-8B (4096): 2.9e-4. The fit is of Llama models: LoRA Without Regret, Thinking
    Machines 2025, with the constants of its tinker-cookbook (hyperparam_utils.py).
    """
    return multiplier * 5e-5 * 10 * float((2000 / hidden_size) ** 0.781)


class Folder:
    """The files of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.plan = root / "plan.json"
        self.checkpoints = root / "checkpoints"
        self.adapter = root / "adapter"
        self.run = root / "run.json"
        self.begun = root / "begun.json"
        """What its checkpoints were made with."""
        self.metrics = root / "step_metrics.csv"
        self.log = root / "log.txt"
        self.lock = root / "lock"
        self.prompts = root / "prompts.json"
        """Prompts as trained, to be compared with the server's."""
        self.gate = root / "gate.json"
        """Validation rows for the comparison of the served models."""
        self.compared = root / "compared"
        """Exists once they were, and were the same."""
        self.published = root / "published"
        """Exists from just before its model is registered."""
        self.pause = root / "pause"
        """While this file exists the run stops at its next step, resumable."""


def write_json(path: Path, value: object) -> None:
    """All of it or nothing."""
    partial = path.with_suffix(".partial")
    with open(partial, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    replace(partial, path)
