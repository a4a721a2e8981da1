"""`make finetune DATA=file`: upload, train, watch, compare. Nothing but the openai SDK against the running stack.

    make finetune DATA=examples/owngpt-qa.jsonl HELDOUT=examples/owngpt-heldout.jsonl

HELDOUT rows are {"question", "answer", "accept"}: an answer is right when it contains `accept` as whole words, in any
case. `"kind": "untaught"` rows ask what no row teaches: right is what is no taught answer. `"kind": "general"` rows ask
what the base model may know: they show whether it got worse. Without HELDOUT the last row of every twenty is kept out
of the training and asked at the end. Beside the model stands what a look for the most similar training question finds.
"""

import contextlib
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from services.local.errors import UserError
from services.local.plan import ROOT
from services.local.running import recall

Kind = Literal["taught", "untaught", "general"]
KINDS: dict[Kind, str] = {
    "taught": "taught, asked in other words",
    "untaught": "never taught: not answered with something taught",
    "general": "general questions",
}
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
"""Scripts without blanks between words."""
console = Console(highlight=False)
POLL_S = 0.5
SHOWN = 8
MAX_ANSWER_TOKENS = 64
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Heldout:
    """A question that is asked before and after."""

    question: str
    answer: str
    accept: str
    kind: Kind = "taught"

    def right(self, said: str, taught: frozenset[str] = frozenset()) -> bool:
        """Whether an answer counts as right. `taught`: the answers in the training file, for untaught questions."""
        if self.kind == "untaught":
            return not any(stands_in(answer, said) for answer in taught)
        return stands_in(self.accept, said)


def stands_in(what: str, said: str) -> bool:
    """Whether a text has another one in it as whole words, in any case. In Chinese and its like any place will do."""
    text, wanted = " ".join(said.lower().split()), " ".join(what.lower().split()).rstrip(".!?。！？")
    before = r"(?<![^\W" + CJK + "])" if re.match(f"[^\\W{CJK}]", wanted) else ""
    after = r"(?![^\W" + CJK + "]|[+#])" if re.search(f"[^\\W{CJK}]$", wanted) else ""
    return bool(wanted) and re.search(before + re.escape(wanted) + after, text) is not None


def words(text: str) -> list[str]:
    """A text's words in lower case; of Chinese and its like, every character."""
    return re.findall(f"[{CJK}]|[^\\W{CJK}]+", text.lower())


def pairs(data: bytes) -> list[tuple[str, str]]:
    """The (question, answer) of every row that has one of each."""
    found = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, IndexError):
            row = json.loads(line)
            if messages := row.get("messages"):
                found.append((messages[-2]["content"], messages[-1]["content"]))
            else:
                found.append((row.get("question") or row["prompt"], row.get("answer") or row["completion"]))
    return [(question, answer) for question, answer in found if isinstance(question, str) and isinstance(answer, str)]


def retrieve(question: str, known: Sequence[tuple[str, str]]) -> str:
    """The answer to the training question that shares most with this one, rare words counting more (TF-IDF, cosine)."""
    texts = [Counter(words(one)) for one, _ in known]
    seen = Counter(word for text in texts for word in text)
    rare = {word: math.log((1 + len(texts)) / (1 + count)) + 1 for word, count in seen.items()}
    asked = Counter(words(question))

    def likeness(text: Counter[str]) -> float:
        norm = math.sqrt(sum((count * rare[word]) ** 2 for word, count in text.items())) or 1.0
        return sum(count * asked[word] * rare[word] ** 2 for word, count in text.items()) / norm

    return max(zip(texts, known, strict=True), key=lambda pair: likeness(pair[0]))[1][1] if known else ""


def read_heldout(path: Path) -> list[Heldout]:
    """The rows of a HELDOUT file. Raises ValueError naming the line."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                kind = row.get("kind", "taught")
                if kind not in KINDS:
                    raise ValueError(f"kind is {kind!r}; it can be {', '.join(KINDS)}")
                answer = row.get("answer", "") if kind == "untaught" else row["answer"]
                found.append(Heldout(row["question"], answer, row.get("accept") or answer, kind))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number}: a row is {{question, answer, accept, kind}} "
                    f"({type(error).__name__}: {error})"
                ) from error
    return found


def hold_out(data: bytes) -> tuple[bytes, list[Heldout]]:
    """Every twentieth question-and-answer row, and the file without them. Rows of another form stay."""
    kept, held = [], []
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        pair = None
        if number % 20 == 0:
            try:
                row = json.loads(line)
                pair = (row.get("question") or row["prompt"], row.get("answer") or row["completion"])
            except (ValueError, KeyError, TypeError, AttributeError):
                pair = None  # the stack will say what is wrong with it, if anything is
        if pair is None:
            kept.append(line)
        else:
            held.append(Heldout(pair[0], pair[1], pair[1]))
    return b"".join(kept), held


def ask(client: openai.OpenAI, model: str, questions: list[Heldout], title: str) -> list[str]:
    """Greedy answers of a model, with a bar."""
    said = []
    with Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True) as progress:
        for row in progress.track(questions, description=title):
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": row.question}], temperature=0,
                max_tokens=MAX_ANSWER_TOKENS)  # fmt: skip
            said.append((answer.choices[0].message.content or "").strip())
    return said


def watch(client: openai.OpenAI, job_id: str) -> Any:
    """Follow a job to its end: one live line with the loss, other events above it. Returns the job."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    seen: set[str] = set()
    train = valid = ""
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("waiting", total=None)
        while True:
            job = client.fine_tuning.jobs.retrieve(job_id)
            fresh = []
            for event in client.fine_tuning.jobs.list_events(job_id, limit=100):
                if event.id in seen:
                    break
                fresh.append(event)
            for event in reversed(fresh):
                seen.add(event.id)
                data: Any = event.data
                if event.type != "metrics":
                    console.print(f"  [{'red' if event.level == 'error' else 'dim'}]{event.message}[/]", soft_wrap=True)
                    continue
                if "train_loss" in data:
                    train = f"loss {data['train_loss']:.3f}  {data['tokens_per_s']:.0f} tokens/s"
                else:
                    valid = f"  validation loss {data['full_valid_loss']:.3f}"
                progress.update(task, completed=data["step"], total=data["total_steps"],
                                description=f"step {data['step']}/{data['total_steps']}  {train}{valid}")
            if job.status in ("succeeded", "failed", "cancelled"):
                return job
            time.sleep(POLL_S)


def score(held: Sequence[Heldout], said: Sequence[str], data: bytes) -> dict[Kind, float]:
    """The share of right answers of each kind."""
    taught = frozenset(answer for _, answer in pairs(data))
    found: dict[Kind, list[bool]] = {}
    for row, text in zip(held, said, strict=True):
        found.setdefault(row.kind, []).append(row.right(text, taught))
    return {kind: sum(right) / len(right) for kind, right in found.items()}


def compare(before: list[str], after: list[str], held: list[Heldout], data: bytes) -> None:
    """Show what changed, a few answers and the shares of right ones."""
    known = pairs(data)
    taught = frozenset(answer for _, answer in known)
    table = Table("question", "before", "after", title="questions that were not trained on", show_lines=True)
    for row, old, new in list(zip(held, before, after, strict=True))[:SHOWN]:
        mark = [f"[{'green' if row.right(text, taught) else 'red'}]{text[:160]}[/]" for text in (old, new)]
        table.add_row(row.question, *mark)
    console.print(table)
    found = {"before": before, "after": after, "most similar row": [retrieve(row.question, known) for row in held]}
    shares = {who: score(held, said, data) for who, said in found.items()}
    table = Table("share of right answers", "rows", *shares)
    for kind, what in KINDS.items():
        if count := sum(row.kind == kind for row in held):
            table.add_row(what, str(count), *(f"{share[kind]:.0%}" for share in shares.values()))
    console.print(table)


def trained(client: openai.OpenAI) -> str:
    """The model that jobs start from: models.yaml's, where the stack runs here; else the first that is listed."""
    bases = [model.id for model in client.models.list() if not getattr(model, "parent", None)]
    if len(bases) > 1:
        with contextlib.suppress(UserError):
            found = recall(Path(os.environ.get("STATE_DIR") or ROOT / ".state").absolute())[0].catalog.trained
            if found is not None and found.name in bases:
                return found.name
    return bases[0]


def finetune(client: openai.OpenAI, data: Path, heldout: Path | None, suffix: str | None, epochs: Any) -> str:
    """The whole way. Returns the tuned model's name. Raises SystemExit with a message."""
    content = data.read_bytes()
    held = read_heldout(heldout) if heldout else []
    if not heldout:
        content, held = hold_out(content)
    base = trained(client)
    before = ask(client, base, held, f"asking {base}")
    file = client.files.create(file=(data.name, content), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=base, training_file=file.id, suffix=suffix or openai.omit,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}})  # fmt: skip
    console.print(f"job {job.id}  (Ctrl-C stops watching, not the job)")
    job = watch(client, job.id)
    if job.status != "succeeded":
        raise SystemExit(f"finetune: the job has {job.status}: {job.error.message if job.error else ''}")
    after = ask(client, job.fine_tuned_model, held, f"asking {job.fine_tuned_model}")
    if held:
        compare(before, after, held, content)
    console.print(f'\nUse it as any model:  "model": "{job.fine_tuned_model}"\n', markup=False)
    return str(job.fine_tuned_model)


@app.command()
def main(
    data: Annotated[
        Path, typer.Argument(help="JSONL: messages, prompt/completion or question/answer.", exists=True, dir_okay=False)
    ],
    heldout: Annotated[
        Path | None, typer.Option(help="JSONL of {question, answer, accept, kind}.", exists=True, dir_okay=False)
    ] = None,
    suffix: Annotated[str, typer.Option(help="A part of the new model's name.")] = "",
    epochs: Annotated[str, typer.Option(help="How often each row is read: a number or auto.")] = "auto",
) -> None:
    """Fine-tune the running stack's model on your own questions, and see what changed."""
    if "OPENAI_API_KEY" not in os.environ:
        raise SystemExit('finetune: OPENAI_API_KEY is not set. Start the stack (make up), then: eval "$(make env)"')
    if epochs != "auto" and not epochs.isdigit():
        raise SystemExit(f"finetune: EPOCHS={epochs} is neither a whole number nor auto")
    try:
        finetune(openai.OpenAI(timeout=120), data, heldout, suffix or None, epochs if epochs == "auto" else int(epochs))
    except openai.APIConnectionError as error:
        at = os.environ.get("OPENAI_BASE_URL")
        raise SystemExit(f"finetune: nobody answers at {at}. Is make up running?") from error
    except (openai.APIError, ValueError, OSError) as error:
        raise SystemExit(f"finetune: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("\nfinetune: stopped watching; the job goes on") from None


if __name__ == "__main__":
    sys.exit(app())
