"""The training loop of a run: transformers' `Trainer` with a LoRA adapter, watched step by step."""

import contextlib
import csv
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from common.files import sync_folder, sync_tree
from services.trainer.events import Events
from services.trainer.plan import (
    COMPLETE,
    MAX_STEPS_BETWEEN_CHECKPOINTS,
    PATIENCE_EVALS,
    Folder,
    Hyperparameters,
    Plan,
    learning_rate,
)
from services.trainer.render import IGNORED, Encoded


def on_gpu() -> bool:
    """Whether this run trains on one."""
    return bool(torch.cuda.is_available())


def computes_bf16() -> bool:
    """Whether this machine has instructions for bf16: with them a step takes 0.6 times as long (docs/log.md)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16"))


def load(plan: Plan) -> Any:
    """The base model with a fresh adapter: bf16 where the hardware computes in it, else fp32."""
    set_seed(plan.seed)
    dtype = torch.bfloat16 if computes_bf16() else torch.float32
    options: dict[str, Any] = {}
    if plan.four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    model = AutoModelForCausalLM.from_pretrained(plan.base, revision=plan.revision or "main", dtype=dtype, **options)
    model.config.use_cache = False
    if plan.four_bit:
        model = prepare_model_for_kbit_training(model)  # type: ignore[no-untyped-call]
    lora = plan.lora
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows padded to the longest of them: input_ids, attention_mask, labels of shape [rows, tokens]."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": torch.tensor(mask),
        "labels": padded("labels", IGNORED),
    }


def micro_batch(batch: int, most: int) -> int:
    """Rows computed at once: the largest divisor of a batch that is at most `most`."""
    return max(size for size in range(1, min(batch, most) + 1) if batch % size == 0)


class Counting(Trainer):  # type: ignore[misc]  # untyped
    """Also counts how many learnt tokens the model would have said itself, and weighs a validation loss by tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts = {True: [0, 0], False: [0, 0]}
        """[right, all] while training and while evaluating."""
        self._loss, self._learnt = 0.0, 0
        """Of this evaluation: nats of all learnt tokens, and their number."""

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._loss, self._learnt = 0.0, 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = self._loss / self._learnt if self._learnt else math.nan
        return output

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        with torch.no_grad():
            wanted = labels[:, 1:]
            learnt = wanted != IGNORED
            said = outputs.logits[:, :-1][learnt].argmax(-1)
            count = self.counts[model.training]
            count[0] += int((said == wanted[learnt]).sum())
            count[1] += int(learnt.sum())
            if not model.training:
                self._loss += float(loss) * int(learnt.sum())
                self._learnt += int(learnt.sum())
        return (loss, outputs) if return_outputs else loss

    def accuracy(self, training: bool) -> float:
        """Right ÷ all since it was asked last."""
        right, seen = self.counts[training]
        self.counts[training] = [0, 0]
        return right / seen if seen else 0.0


class Watch(TrainerCallback):  # type: ignore[misc]  # untyped
    """Turns what the Trainer does into events, rows of step_metrics.csv, and obeys `pause`."""

    def __init__(self, folder: Folder, events: Events, tokens_per_epoch: int) -> None:
        self._folder, self._events, self._tokens_per_epoch = folder, events, tokens_per_epoch
        self.trainer: Counting
        self.paused = False
        self.quiet = True
        """Evaluations before and after training are no events."""
        self._train: dict[str, float] = {}
        self._valid: dict[str, float] = {}
        self._began = 0.0
        self._began_at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.quiet = False
        self._began, self._began_at = time.monotonic(), state.global_step
        kept = []
        with contextlib.suppress(FileNotFoundError), open(self._folder.metrics, newline="") as file:
            kept = [row for row in csv.reader(file) if row[:1] != ["step"] and int(row[0]) <= state.global_step]
        with open(self._folder.metrics, "w", newline="") as file:
            csv.writer(file).writerows(
                [["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"], *kept]
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self._folder.pause.exists() and state.global_step < state.max_steps:
            self.paused = True
            control.should_save = control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" not in logs:
            return
        done = state.global_step - self._began_at
        took = time.monotonic() - self._began
        per_step = self._tokens_per_epoch * state.num_train_epochs / max(1, state.max_steps)
        self._train = {"train_loss": logs["loss"], "train_mean_token_accuracy": self.trainer.accuracy(True)}
        self._events.say(
            "metrics",
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=round(state.epoch or 0, 3),
            **self._train,
            tokens_per_s=round(done * per_step / took, 1) if took else 0,
            eta_s=round(took / done * (state.max_steps - state.global_step), 1) if done else 0,
        )
        self._write(state.global_step, self._train["train_loss"], self._train["train_mean_token_accuracy"], "", "")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        if self.quiet:
            return
        self._valid = {
            "full_valid_loss": metrics["eval_loss"],
            "full_valid_mean_token_accuracy": self.trainer.accuracy(False),
        }
        self._events.say("metrics", step=state.global_step, total_steps=state.max_steps, **self._valid)
        self._write(state.global_step, "", "", *self._valid.values())

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        path = self._folder.checkpoints / f"checkpoint-{state.global_step}"
        sync_tree(path)  # what says that it is complete must not reach the disk before it
        (path / COMPLETE).touch()
        sync_folder(path)
        if not self.paused:
            self._events.say("checkpoint", step=state.global_step, metrics=self._train | self._valid)

    def _write(self, *row: object) -> None:
        with open(self._folder.metrics, "a", newline="") as file:
            csv.writer(file).writerow(row)


def _gate_rows(folder: Folder) -> list[dict[str, list[int]]]:
    """The rows on which the served model is compared, as the Trainer takes them."""
    rows = json.loads(folder.gate.read_text())
    learnt = [set(row["learnt"]) for row in rows]
    return [
        {"input_ids": row["tokens"], "labels": [t if at in known else IGNORED for at, t in enumerate(row["tokens"])]}
        for row, known in zip(rows, learnt, strict=True)
    ]


def train(
    plan: Plan,
    chosen: Hyperparameters,
    folder: Folder,
    model: Any,
    tokenizer: Any,
    training: list[Encoded],
    validation: list[Encoded],
    events: Events,
    last: Path | None,
) -> dict[str, float] | None:
    """Train to the end, from the checkpoint `last` if there is one. Returns the figures, or None when paused."""
    micro = micro_batch(chosen.batch_size, plan.micro_batch)
    steps = -(-len(training) // chosen.batch_size)
    every = min(steps, MAX_STEPS_BETWEEN_CHECKPOINTS)
    trainer = Counting(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder.checkpoints),
            seed=plan.seed,
            data_seed=plan.seed,
            use_cpu=not on_gpu(),
            gradient_checkpointing=on_gpu(),  # a third more time for most of the activations' memory
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=computes_bf16(),
            num_train_epochs=chosen.n_epochs,
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=plan.micro_batch,
            gradient_accumulation_steps=chosen.batch_size // micro,
            learning_rate=learning_rate(model.config.hidden_size, chosen.learning_rate_multiplier),
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            max_grad_norm=1.0,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to=[],
            disable_tqdm=True,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            prediction_loss_only=True,
            remove_unused_columns=False,
            include_num_input_tokens_seen="non_padding",
            restore_callback_states_from_checkpoint=True,  # early stopping counts on where it was
        ),
        train_dataset=[{"input_ids": one.input_ids, "labels": one.labels} for one in training],
        eval_dataset=[{"input_ids": one.input_ids, "labels": one.labels} for one in validation],
        data_collator=collate,
    )
    watch = Watch(folder, events, sum(len(one.input_ids) for one in training))
    watch.trainer = trainer
    trainer.add_callback(watch)
    trainer.add_callback(EarlyStoppingCallback(PATIENCE_EVALS))
    with model.disable_adapter():
        base = float(trainer.evaluate()["eval_loss"])
    trainer.accuracy(False)
    events.say("message", level="info", message=f"validation loss of the base model: {base:.4f}")
    if last is not None:
        events.say("message", level="info", message=f"going on from step {last.name.rpartition('-')[2]}")
    outcome = trainer.train(resume_from_checkpoint=str(last) if last else None)
    if watch.paused:
        return None
    watch.quiet = True
    compared = _gate_rows(folder)
    gate_loss = float(trainer.evaluate(eval_dataset=compared)["eval_loss"]) if compared else None
    trainer.accuracy(False)
    final = trainer.evaluate()
    trainer.model.save_pretrained(folder.adapter, safe_serialization=True)
    state = trainer.state
    return {
        "base_valid_loss": base,
        "valid_loss": float(final["eval_loss"]),
        **({"gate_loss": gate_loss} if gate_loss is not None else {}),
        "valid_mean_token_accuracy": trainer.accuracy(False),
        "best_step": float(state.best_global_step or state.global_step),
        "steps": float(state.global_step),
        "trained_tokens": float(state.num_input_tokens_seen),
        "train_loss": float(outcome.training_loss),
    }
