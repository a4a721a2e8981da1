"""One training run: `python -m services.trainer.run FOLDER`, with FOLDER/plan.json.

Prints one JSON object a line, the events of `Events`; at `ready` it waits for a line, `go`. Ends with 0 (done), 3 (the
data is at fault), 75 (paused) or something else (a bug, a signal). Started again it goes on from its last complete
checkpoint, with the same result as an unbroken run: order, dropout, optimizer and schedule are part of a checkpoint.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import platform
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from common import dataset
from common.sizing.cards import CannotSay
from services.trainer import gate, render, room
from services.trainer.events import Events
from services.trainer.plan import (
    COMPLETE,
    DATA_AT_FAULT,
    PAUSED,
    VALIDATION_ROWS,
    VALIDATION_SHARE,
    Folder,
    Hyperparameters,
    Plan,
    learning_rate,
    resolve,
    write_json,
)

MAX_REPORTED = 1000
PROMPTS_COMPARED = 16

def read(path: Path, min_examples: int = dataset.MIN_EXAMPLES) -> dataset.Dataset:
    """A file's examples and problems."""
    with open(path, "rb") as lines:
        return dataset.read(dataset.open_lines(lines), min_examples=min_examples)


def split(found: dataset.Dataset, seed: int) -> tuple[dataset.Dataset, dataset.Dataset]:
    """(training, validation): a tenth held out by a hash of each row and the seed; equal rows stay together, as one."""

    def place(example: dataset.Example) -> str:
        return hashlib.sha256(f"{seed} {example.fingerprint.hex()}".encode()).hexdigest()

    fewest, most = VALIDATION_ROWS
    places = sorted(set(map(place, found.examples)))
    bound = places[min(max(fewest, round(len(places) * VALIDATION_SHARE)), most, len(places) // 2)]
    held = [example for example in found.examples if place(example) < bound]
    kept = [example for example in found.examples if place(example) >= bound]
    return dataset.Dataset(kept), dataset.Dataset(held)


def prepare(
    plan: Plan, folder: Folder, tokenizer: Any, events: Events
) -> tuple[list[render.Encoded], list[render.Encoded]] | None:
    """The encoded training and validation rows; None after telling everything that is wrong with the files."""
    training = read(Path(plan.training_file))
    problems = [("training_file", problem) for problem in training.problems]
    validation = None
    if plan.validation_file:
        validation = read(Path(plan.validation_file), min_examples=1)
        problems += [("validation_file", problem) for problem in validation.problems]
    if not problems and validation is None:
        training, validation = split(training, plan.seed)
    parts = []
    for param, part in (("training_file", training), ("validation_file", validation or dataset.Dataset())):
        encoded, wrong, cut = render.encode_all(part, tokenizer, plan.max_tokens)
        problems += [(param if plan.validation_file else "training_file", problem) for problem in wrong]
        parts.append(encoded)
        if cut:
            events.say(
                "message",
                level="warn",
                message=f"{param}: {len(cut)} rows are longer than {plan.max_tokens} tokens "
                f"and are cut: lines {', '.join(map(str, cut[:10]))}{', …' if len(cut) > 10 else ''}",
            )
    if problems:
        events.say(
            "rejected",
            problems=[{"param": p, **msgspec.to_builtins(w)} for p, w in problems[:MAX_REPORTED]],
            count=len(problems),
            summary=dataset.summary([w for _, w in problems]),
        )
        return None
    assert validation is not None  # noqa: S101 - given, or split off
    if training.duplicates:
        events.say(
            "message",
            level="warn",
            message=f"{training.repeated} rows say the same as an earlier one: "
            + ", ".join(f"line {a} = {b}" for a, b in training.duplicates[:5]),
        )
    if plan.validation_file and (shared := dataset.overlap(training, validation)):
        events.say(
            "message",
            level="warn",
            message=f"{len(shared)} validation rows are also in the training file, so "
            f"the validation loss says too little: validation line {shared[0][0]} = training line {shared[0][1]}",
        )
    examples = {example.line: example for example in validation.examples}
    write_json(
        folder.prompts,
        [
            {"messages": examples[one.line].messages[:at], "tools": examples[one.line].tools, "tokens": prompt}
            for one in parts[1]
            for at, prompt in one.prompts
        ][:PROMPTS_COMPARED],
    )
    write_json(folder.gate, gate.spread([
        {"tokens": one.input_ids, "learnt": [at for at, label in enumerate(one.labels) if label != render.IGNORED]}
        for one in parts[1] if len(one.input_ids) < plan.max_tokens  # the worker makes one more
    ]))
    tokens = [len(one.input_ids) for one in parts[0]]
    events.say(
        "data",
        rows=len(parts[0]),
        validation_rows=len(parts[1]),
        tokens=sum(tokens),
        learnt_tokens=sum(one.learnt for one in parts[0]),
        longest=render.longest(parts[0]),
    )
    return parts[0], parts[1]


def describe(plan: Plan, chosen: Hyperparameters, model: Any, tokenizer: Any) -> dict[str, object]:
    """What would be needed to do it again: versions, hashes, settings."""
    names = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")
    files = {"training_file": plan.training_file, "validation_file": plan.validation_file}
    return {
        "plan": msgspec.to_builtins(plan),
        "hyperparameters": msgspec.to_builtins(chosen),
        "learning_rate": learning_rate(model.config.hidden_size, chosen.learning_rate_multiplier),
        "sha256": {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in files.items() if path}
        | {"chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()},
        "versions": {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()},
        "device": str(model.device),
        "dtype": str(model.dtype),
        "cpu": platform.machine(),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def clean(checkpoints: Path) -> Path | None:
    """Remove checkpoints that were not written to their end; the last complete one."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found:
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    return next((path for path in reversed(found) if path.exists()), None)


def resumed(plan: Plan, folder: Folder, events: Events) -> Path | None:
    """The checkpoint to go on from; none of another base, other bits or other rows, whose losses are not comparable."""
    now = {
        "base": Path(plan.base).name, "revision": plan.revision,
        "four_bit": plan.four_bit, "max_tokens": plan.max_tokens,
    }  # fmt: skip
    before = json.loads(folder.begun.read_text()) if folder.begun.exists() else now
    if before != now:
        changed = ", ".join(f"{name} {before[name]!r} is {now[name]!r}" for name in now if before[name] != now[name])
        events.say("message", level="warn", message=f"It begins anew, for what it began with has changed: {changed}")
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        folder.metrics.unlink(missing_ok=True)
    write_json(folder.begun, now)
    return clean(folder.checkpoints)


def main(root: Path) -> int:
    """The run. Returns the exit status."""
    folder, events = Folder(root), Events()
    lock = open(folder.lock, "w")  # noqa: SIM115 - held until this process ends
    fcntl.flock(lock, fcntl.LOCK_EX)  # a run whose trainer was killed ends at its next event: wait for that
    plan = msgspec.json.decode(folder.plan.read_bytes(), type=Plan)
    events.say("message", level="info", message="reading the files")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plan.base, revision=plan.revision or "main")
    prepared = prepare(plan, folder, tokenizer, events)
    if prepared is None:
        return DATA_AT_FAULT
    training, validation = prepared
    chosen = resolve(plan, len(training))
    events.say("resolved", **msgspec.to_builtins(chosen))
    random.seed(plan.seed)
    from services.trainer import loop

    try:
        longest = max(len(one.input_ids) for one in (*training, *validation))
        plan = room.on_a_gpu(plan, len(tokenizer), longest) if loop.on_gpu() else room.on_a_cpu(plan)
    except CannotSay as error:
        sys.exit(str(error))
    last = resumed(plan, folder, events)
    events.say("ready")
    if not sys.stdin.readline():  # `go`, once the GPU is ours; nothing: the trainer is gone
        return PAUSED
    began = time.time()
    model = loop.load(plan)
    run = describe(plan, chosen, model, tokenizer)
    result = loop.train(plan, chosen, folder, model, tokenizer, training, validation, events, last)
    if result is None:
        return PAUSED
    write_json(folder.run, run | {"result": result, "seconds": round(time.time() - began, 1)})
    events.say("done", **result)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
