"""An entry more in models.yaml, its owner's lines and comments as they are."""

import fcntl
import json
from pathlib import Path

import msgspec
import yaml

from common.files import write_whole
from services.local import catalog
from services.local.catalog import Entry
from services.local.errors import UserError

HEAD = "# What this stack serves. Made by `make quantize`; more can stand here: examples/models.yaml.\nmodels:\n"


def register(path: Path, new: Entry, original: Entry) -> bool:
    """Add an entry; where no models.yaml is, make one with the `original` before it.

    Returns False when there is such an entry already. Raises UserError when the file is wrong, or would be, or cannot
    be written; then it is as it was.
    """
    try:
        whole = path.resolve()  # a link stays one
        with open(whole.with_name(f".{whole.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two that end at once: each reads what the other wrote
            return _register(whole, new, original)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. The entry would be: {shown(new)}") from error


def check(path: Path, new: Entry) -> bool:
    """Whether models.yaml has such an entry. Raises UserError when it has another one of that name."""
    if not path.exists():
        return False
    there = next((one for one in catalog.read(path).models if (one.name, one.engine) == (new.name, "vllm")), None)
    if there is not None and Path(there.source).resolve() != Path(new.source).resolve():
        raise UserError(f"{path} has a model {new.name!r} already, in {there.source}; the copy is {new.source}. "
                        "Remove the entry, or name one of them otherwise.")
    return there is not None


def _register(whole: Path, new: Entry, original: Entry) -> bool:
    if not whole.exists():
        text = f"{HEAD}  - {shown(original)}\n  - {shown(new)}\n"
    elif check(whole, new):
        return False
    else:
        text = inserted(whole.read_text(), f"- {shown(new)}")
    tried = whole.with_name(f".{whole.name}.tried")
    try:
        tried.write_text(text)
        catalog.read(tried)
    finally:
        tried.unlink(missing_ok=True)
    mode = whole.stat().st_mode & 0o777 if whole.exists() else None
    write_whole([text.encode()], whole)
    if mode is not None:
        whole.chmod(mode)
    return True


def shown(entry: Entry) -> str:
    """An entry on one line."""
    fields = msgspec.to_builtins(entry)
    return "{" + ", ".join(f"{name}: {json.dumps(value)}" for name, value in fields.items()) + "}"


def inserted(text: str, entry: str) -> str:
    """The text with an entry after the last of `models`."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)  # noqa: S101 - it has been read as a catalog
    models = next(value for key, value in root.value if key.value == "models")
    last = models.value[-1]
    if models.flow_style:
        at = last.end_mark.index
        return f"{text[:at]}, {entry.removeprefix('- ')}{text[at:]}"
    lines = text.splitlines(keepends=True)
    end = last.end_mark.line + (last.end_mark.column > 0)  # a block ends where the next thing begins
    while end > last.start_mark.line + 1 and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
        end -= 1
    if not lines[end - 1].endswith("\n"):
        lines[end - 1] += "\n"
    first = lines[models.value[0].start_mark.line]
    indent = first[: len(first) - len(first.lstrip())]  # the list's own mark may be an anchor, or a tag
    return "".join([*lines[:end], f"{indent}{entry}\n", *lines[end:]])
