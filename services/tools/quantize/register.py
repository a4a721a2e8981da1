"""An entry more in models.yaml, its owner's lines and comments as they are."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from common.files import write_whole
from services.local import catalog

HEAD = (
    "# What this stack serves. Made by `make quantize`; examples/models.yaml shows what else can stand here.\nmodels:\n"
)


def register(path: Path, name: str, folder: Path, original: Mapping[str, str]) -> bool:
    """Add the folder as a model called `name`; where no models.yaml is, make one with the `original` before it.

    Returns False when there is such an entry already. Raises UserError when the file is wrong.
    """
    added = f"- {{name: {json.dumps(name)}, source: {json.dumps(str(folder))}, adapters: false}}"
    if not path.exists():
        first = "- {" + ", ".join(f"{field}: {json.dumps(value)}" for field, value in original.items()) + "}"
        write_whole([f"{HEAD}  {first}\n  {added}\n".encode()], path)
        return True
    if any(entry.name == name and entry.engine == "vllm" for entry in catalog.read(path).models):
        return False
    text = path.read_text()
    write_whole([inserted(text, added).encode()], path)
    catalog.read(path)
    return True


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
    indent = " " * models.start_mark.column
    return "".join([*lines[:end], f"{indent}{entry}\n", *lines[end:]])
