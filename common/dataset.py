"""What a training file may contain, and everything that is wrong with one. Pure: knows no tokenizer and no model.

One JSON object a line, in one of three forms:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…", "weight": 1}]}
    {"prompt": "…", "completion": "…"}
    {"question": "…", "answer": "…"}

The first is OpenAI's (https://platform.openai.com/docs/guides/supervised-fine-tuning); codes of problems follow the
categories of OpenAI's cookbook (Chat_finetuning_data_prep). Nothing is dropped in silence: a row is either an example
or a problem with its line.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import BinaryIO

ROLES = ("system", "developer", "user", "assistant", "tool")
ROW_KEYS = frozenset({"messages", "tools", "parallel_tool_calls"})
MESSAGE_KEYS = frozenset({"role", "content", "name", "weight", "tool_calls", "tool_call_id", "refusal"})
PAIRS = {"prompt": "completion", "question": "answer"}
MIN_EXAMPLES = 10
MAX_LINE_BYTES = 1024 * 1024
CALL = """a call is {"function": {"name": "…", "arguments": "…"}}, with the text of a JSON object as arguments"""
SHOWN_CHARS = 100
MAX_ROWS = 1_000_000  # more say nothing that a LoRA adapter can hold, and each fingerprint is remembered
MAX_PROBLEMS = 1000
"""With so many the rest of a file is not read: it is another kind of file."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `line` counts from 1; 0: the file as a whole. `path` is the field: messages[1].role."""

    line: int
    path: str
    code: str
    message: str

    def __str__(self) -> str:
        where = f"line {self.line}" if self.line else "file"
        return f"{where}{f', {self.path}' if self.path else ''}: {self.message} ({self.code})"


@dataclass(frozen=True)
class Example:
    """A conversation to learn from: OpenAI's messages without `weight`, and which of them are learnt."""

    line: int
    messages: tuple[dict[str, object], ...]
    learnt: tuple[bool, ...]
    tools: tuple[object, ...] = ()

    @property
    def fingerprint(self) -> bytes:
        """Equal for rows that say the same: a digest, 16 bytes."""
        said = json.dumps([self.messages, self.learnt, self.tools], sort_keys=True, ensure_ascii=False)
        return blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass
class Dataset:
    """A file's examples and everything that was found wrong or odd in it."""

    examples: list[Example] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    """(line, earlier line that says the same), the first MAX_PROBLEMS of `repeated`"""
    repeated: int = 0
    lines: dict[bytes, int] = field(default_factory=dict)
    """Fingerprints of all examples, and the line on which each came first."""


def open_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is longer than MAX_LINE_BYTES, so much that this shows, and then no more."""
    for raw in iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""):
        yield raw
        if len(raw) > MAX_LINE_BYTES:
            return


def read(lines: Iterable[bytes], *, min_examples: int = MIN_EXAMPLES, keep: bool = True) -> Dataset:
    """Check every line of a file. Without `keep` the examples themselves are forgotten again."""
    found = Dataset()
    rows = 0
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        rows += 1
        before = len(found.problems)
        row = _parse(number, raw, found.problems)
        example = None if row is None else _example(number, row, found.problems)
        if example is not None and len(found.problems) == before:
            if keep:
                found.examples.append(example)
            if (earlier := found.lines.setdefault(example.fingerprint, number)) != number:
                found.repeated += 1
                if len(found.duplicates) < MAX_PROBLEMS:
                    found.duplicates.append((number, earlier))
        if rows > MAX_ROWS:
            found.problems.append(Problem(number, "", "too_many_examples", f"more than {MAX_ROWS} rows"))
            return found
        if len(found.problems) >= MAX_PROBLEMS:
            text = f"{MAX_PROBLEMS} problems up to here; the rest of the file was not read"
            found.problems[MAX_PROBLEMS:] = [Problem(number, "", "too_many_problems", text)]
            return found
    if rows < min_examples:
        found.problems.append(
            Problem(
                0, "", "too_few_examples", f"{rows} rows; at least {min_examples} are needed, a few hundred are good"
            )
        )
    elif not found.problems and (different := len(found.lines)) < min_examples:
        text = f"{different} different rows among {rows}; at least {min_examples} are needed, a few hundred are good"
        found.problems.append(Problem(0, "", "too_few_examples", text))
    return found


def overlap(training: Dataset, validation: Dataset) -> list[tuple[int, int]]:
    """(line of the validation file, line of the training file) that say the same: a validation loss of no worth."""
    return [(line, training.lines[said]) for said, line in validation.lines.items() if said in training.lines]


def summary(problems: list[Problem], limit: int = 5) -> str:
    """The first few problems and how many of each code there are."""
    counts = ", ".join(f"{count} × {code}" for code, count in Counter(p.code for p in problems).most_common())
    shown = "\n".join(map(str, problems[:limit]))
    more = f"\n… and {len(problems) - limit} more" if len(problems) > limit else ""
    return f"{len(problems)} problem{'s' if len(problems) > 1 else ''} ({counts}):\n{shown}{more}"


def _parse(line: int, raw: bytes, problems: list[Problem]) -> dict[str, object] | None:
    """The object on a line."""

    def wrong(code: str, message: str) -> dict[str, object] | None:
        problems.append(Problem(line, "", code, message))
        return None

    if len(raw) > MAX_LINE_BYTES:
        return wrong("line_too_long", f"more than {MAX_LINE_BYTES} bytes; the lines after it were not read")
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return wrong("not_utf8", f"byte {error.start} is not UTF-8; save the file as UTF-8")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        if line == 1 and text.lstrip().startswith("["):
            return wrong(
                "not_jsonl", "the file is one JSON array; write one object a line (JSONL), without brackets and commas"
            )
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        return wrong("invalid_json", f"not JSON: {reason}{_column(error)}")
    if isinstance(row, list) and line == 1:
        return wrong("not_jsonl", "an array; write one object a line (JSONL)")
    if not isinstance(row, dict):
        return wrong("data_type", f"{_kind(row)}; each line is an object")
    return row


def _column(error: Exception) -> str:
    return f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""


def _example(line: int, row: dict[str, object], problems: list[Problem]) -> Example | None:
    """The row as an example; None when it has problems, which are added."""
    for question, answer in PAIRS.items():
        if question in row or answer in row:
            return _pair(line, row, question, answer, problems)
    if "messages" not in row:
        problems.append(
            Problem(
                line,
                "messages",
                "missing_messages_list",
                'no "messages"; a row has "messages", or "prompt" and "completion", or "question" and "answer"',
            )
        )
        return None
    problems += (
        Problem(line, shown(key), "unrecognized_key", f"{shown(key)} is not a field of a chat row")
        for key in sorted(row.keys() - ROW_KEYS)
    )
    messages, tools = row["messages"], row.get("tools") or []
    if not isinstance(messages, list) or not messages:
        problems.append(
            Problem(line, "messages", "missing_messages_list", f"{_kind(messages)}; a list of messages is needed")
        )
        return None
    if not isinstance(tools, list):
        problems.append(Problem(line, "tools", "data_type", f"{_kind(tools)}; a list of tools is needed"))
        return None
    before = len(problems)
    for at, message in enumerate(messages):
        problems += (Problem(line, f"messages[{at}]{path}", code, text) for path, code, text in _wrong(message))
    if len(problems) > before:
        return None
    learnt = tuple(m["role"] == "assistant" and m.get("weight", 1) == 1 for m in messages)
    if not any(m["role"] == "assistant" for m in messages):
        problems.append(
            Problem(line, "messages", "example_missing_assistant_message", "no assistant message: nothing to learn")
        )
        return None
    if not any(learnt):
        problems.append(
            Problem(line, "messages", "nothing_learnt", "every assistant message has weight 0: nothing to learn")
        )
        return None
    if messages[0]["role"] == "assistant":
        problems.append(
            Problem(
                line,
                "messages[0].role",
                "assistant_first",
                "the first message is the assistant's; a question comes first",
            )
        )
        return None
    kept = tuple({k: v for k, v in m.items() if k != "weight" and v is not None} for m in messages)
    return Example(line, kept, learnt, tuple(tools))


def _pair(line: int, row: dict[str, object], question: str, answer: str, problems: list[Problem]) -> Example | None:
    before = len(problems)
    for key in (question, answer):
        if key not in row:
            problems.append(
                Problem(
                    line, key, "missing_content", f"no {key!r} beside {(answer if key == question else question)!r}"
                )
            )
        elif not isinstance(row[key], str) or not str(row[key]).strip():
            problems.append(Problem(line, key, "missing_content", f"{_kind(row[key])}; text is needed"))
    problems += (
        Problem(line, shown(key), "unrecognized_key", f"{shown(key)} beside {question!r} and {answer!r}")
        for key in sorted(row.keys() - {question, answer})
    )
    if len(problems) > before:
        return None
    turns = ({"role": "user", "content": row[question]}, {"role": "assistant", "content": row[answer]})
    return Example(line, turns, (False, True))


def _wrong(message: object) -> Iterator[tuple[str, str, str]]:
    """(path, code, what is wrong) for one message."""
    if not isinstance(message, dict):
        yield "", "data_type", f"{_kind(message)}; a message is an object"
        return
    for key in sorted(message.keys() - MESSAGE_KEYS):
        yield f".{shown(key)}", "message_unrecognized_key", f"{shown(key)} is not a field of a message"
    role = message.get("role")
    if "role" not in message:
        yield ".role", "message_missing_key", 'no "role"'
    elif role not in ROLES:
        yield ".role", "unrecognized_role", f"{shown(role)!r}; a role is one of {', '.join(ROLES)}"
    content = message.get("content")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and calls and all(isinstance(call, dict) for call in calls)):
        yield ".tool_calls", "data_type", f"{_kind(calls)}; a list of calls is needed"
    elif calls is not None and (bad := [at for at, call in enumerate(calls) if not _callable(call)]):
        yield f".tool_calls[{bad[0]}]", "invalid_tool_call", CALL
    elif not isinstance(content, str) and not (content is None and calls and role == "assistant"):
        yield ".content", "missing_content", f"{_kind(content)}; text is needed"
    elif isinstance(content, str) and not content.strip() and not calls:
        yield ".content", "missing_content", "empty text"
    if "weight" in message:
        if role != "assistant":
            yield ".weight", "weight_not_assistant", "only assistant messages have a weight"
        elif message["weight"] not in (0, 1) or isinstance(message["weight"], bool):
            yield ".weight", "invalid_weight", f"{shown(message['weight'])}; a weight is 0 or 1"


def shown(value: object) -> str:
    """What somebody has written, in a message: the beginning of it, and nothing that JSON could not say again."""
    return str(value)[:SHOWN_CHARS].encode("utf-8", "backslashreplace").decode()


def _callable(call: dict[str, object]) -> bool:
    """Whether a tool call names a function and has arguments that are an object, or the text of one."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return False
    return isinstance(arguments, dict)


def _kind(value: object) -> str:
    """A value's JSON type, with an article."""
    if value is None:
        return "nothing"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "an array", dict: "an object"}
    return "an empty text" if value == "" else "an empty array" if value == [] else names[type(value)]
