"""What monitoring/alloy/config.alloy does to a line: its stages, read from the file itself and carried out here.

Alloy is not to be had without an image registry; this knows the few stages the file uses, as Alloy's reference describes
them (loki.process), and fails on any other.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import hcl2
import jmespath

from services.local.plan import ROOT

CONFIG = ROOT / "monitoring/alloy/config.alloy"
_TEMPLATE = re.compile(r"\{\{ if \.(\w+) \}\}\{\{ \.\1 \}\}\{\{ else \}\}(\w+)\{\{ end \}\}")


@dataclass
class Entry:
    """What reaches Loki."""

    line: str
    labels: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    stamp: str = ""


def blocks() -> dict[str, Any]:
    """The file's blocks. HCL has no dots in block names, Alloy does."""
    text = re.sub(r"^\s*[a-z_.]+(?= .*\{$)", lambda name: name[0].replace(".", "__"), CONFIG.read_text(), flags=re.M)
    return hcl2.loads(text)


def stages() -> list[tuple[str, dict[str, Any]]]:
    """The stages of loki.process, in order."""
    text = CONFIG.read_text()
    body = text[text.index('loki.process "lines"'):text.index('loki.write "loki"')]
    order = re.findall(r"^\tstage\.(\w+)", body, flags=re.M)
    process = _clean(blocks()["loki__process"][0])
    process = next(iter(process.values()))
    found = {name: list(process[f"stage__{name}"]) for name in set(order)}
    return [(name, found[name].pop(0)) for name in order]


def carry_out(raw: str) -> Entry | None:
    """A line of Docker's json-file as it reaches Loki, or None when it is dropped."""
    entry, extracted = Entry(raw, {"filename": "/var/lib/docker/containers/x/x-json.log"}), {}
    for name, stage in stages():
        if name == "json":
            try:
                document = json.loads(extracted[stage["source"]] if "source" in stage else entry.line)
            except ValueError:
                continue
            for target, expression in stage["expressions"].items():
                extracted[target] = jmespath.search(expression, document) if isinstance(document, dict) else None
        elif name == "timestamp":
            assert stage["format"] == "RFC3339Nano"
            entry.stamp = extracted[stage["source"]]
        elif name == "template":
            variable, otherwise = _TEMPLATE.fullmatch(stage["template"]).groups()
            assert variable == stage["source"]
            extracted[variable] = extracted.get(variable) or otherwise
        elif name in ("labels", "structured_metadata"):
            kept = entry.labels if name == "labels" else entry.metadata
            kept.update({to: str(extracted[source]) for to, source in stage["values"].items() if extracted.get(source) is not None})
        elif name == "match":
            assert stage["action"] == "drop"
            label, value = re.fullmatch(r'\{(\w+)="(\w+)"\}', stage["selector"]).groups()
            if entry.labels.get(label) == value:
                return None
        elif name == "label_drop":
            for label in stage["values"]:
                entry.labels.pop(label, None)
        elif name == "output":
            entry.line = extracted[stage["source"]]
        else:
            raise AssertionError(f"stage.{name} is not known here")
    return entry


def _clean(value: Any) -> Any:
    """hcl2 leaves quotes around strings and keys; take them off."""
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items() if not str(key).startswith("__is")}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] == '"':
        return json.loads(value)
    return value
