"""models.yaml: what this stack serves, one entry a model: read and checked.

`make up` and compose get the same entries (`places.py` says where each runs). Without the file there is one entry, made
of MODEL and WORKERS. Its JSON schema for editors is made from the classes here: `python -m services.local.catalog`.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml
from msgspec import Meta

from services.local import model as bundled
from services.local.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = "bundled"
SCHEMA = Path(__file__).parent / "models.schema.json"
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_UNKNOWN = re.compile(r"unknown field `(.+)`")
_FIELD = re.compile(r"\.(\w+)|\[(\d+)\]")
Text = Annotated[str, Meta(min_length=1)]
Engine = Literal["vllm", "llamacpp", "trtllm", "sglang", "attached"]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One model."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,95}$", description="what clients ask for")]
    source: Annotated[Text, Meta(description="bundled, a checkpoint folder, or a hub name like org/model@revision")] = (
        BUNDLED
    )
    task: Annotated[Literal["chat", "embedding", "rerank"], Meta(description="what it is for")] = "chat"
    engine: Annotated[Engine, Meta(description="what runs it; trtllm, sglang, attached: it runs at `url`")] = "vllm"
    url: Annotated[str, Meta(pattern=r"^(https?://[^/\s]+(/\S*)?)?$", description="where such an engine runs")] = ""
    key_file: Annotated[str, Meta(description="the file with the key that the server at `url` asks for")] = ""
    start: Annotated[Literal["always", "on_demand"], Meta(
        description="on_demand: started by the first request for it; takes turns with others of its kind"
    )] = "always"
    replicas: Annotated[int, Meta(ge=1, le=16, description="workers that serve it")] = 1
    gpus: Annotated[int, Meta(ge=1, le=8, description="GPUs a worker, over which the weights are split")] = 1
    gpu_memory: Annotated[float, Meta(gt=0, le=0.98, description="share of its GPUs' memory; else dealt")] | None = (
        None
    )
    kv_cache_gib: Annotated[int, Meta(ge=1, description="CPU: memory for KV blocks")] | None = None
    max_tokens: Annotated[int, Meta(ge=0, description="longest sequence; 0: the model's, or what fits")] = 0
    sequences: Annotated[int, Meta(ge=0, description="requests at once; 0: what suits the accelerator")] = 0
    adapters: Annotated[bool, Meta(description="whether it can be fine-tuned and serve tuned models")] = True
    arguments: Annotated[str, Meta(description="further vLLM flags, as on a command line")] = ""

    @property
    def elsewhere(self) -> bool:
        """Whether somebody else runs the engine, at `url`."""
        return self.engine in ("trtllm", "sglang", "attached")

    def model(self, models: Path) -> str:
        """What MODEL is: a checkpoint folder, a hub name, a GGUF; of an engine elsewhere its own name for the model.

        `models`: where the bundled one is unpacked.
        """
        if self.source == BUNDLED:
            return self.name if self.elsewhere else str(models / bundled.FOLDERS[self.engine])
        return self.source if self.elsewhere else self.source.partition("@")[0]

    @property
    def revision(self) -> str:
        """A hub model's; empty: its main branch."""
        return "" if self.elsewhere or Path(self.source).is_absolute() else self.source.partition("@")[2]

    @property
    def slug(self) -> str:
        """Its name as a part of a program's; of two engines of one name, two."""
        tail = "" if self.engine == "vllm" else f"-{self.engine}"
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:40]
        return (plain if plain == self.name else f"{plain}-{sha256(self.name.encode()).hexdigest()[:4]}") + tail


class Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file."""

    models: Annotated[list[Entry], Meta(min_length=1, max_length=64)]
    awake: Annotated[int, Meta(ge=1, le=64, description="on_demand models of one place that are awake at once")] = 1

    @property
    def trained(self) -> Entry | None:
        """The model that fine-tuning jobs start from."""
        return next((e for e in self.models if e.task == "chat" and e.adapters and e.engine == "vllm"), None)


def models_path() -> Path:
    """Where models.yaml is, if there is one."""
    return Path(os.environ.get("MODELS_FILE") or ROOT / "models.yaml")


def read(path: Path) -> Catalog:
    """The file's entries, folders made absolute. Raises UserError with file, line and field."""
    try:
        text = path.read_text()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: no YAML: {getattr(error, 'problem', error)}") from error
    try:
        found = msgspec.convert(document, Catalog)
    except msgspec.ValidationError as error:
        said, _, field = str(error).partition(" - at `$")
        field = field.rstrip("`")
        if unknown := _UNKNOWN.search(said):
            field, said = f"{field}.{unknown[1]}", "there is no such field"
        raise UserError(f"{path}, line {_line(root, field)}: {field.lstrip('.') or 'the file'}: {said}") from error
    for field, problem in _problems(found, path.parent):
        raise UserError(f"{path}, line {_line(root, field)}: {field.lstrip('.')}: {problem}")
    return msgspec.structs.replace(found, models=[_absolute(entry, path.parent) for entry in found.models])


def _problems(found: Catalog, base: Path) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it) of what the classes cannot say."""
    names: set[tuple[str, str]] = set()
    slugs: dict[str, str] = {}
    for number, entry in enumerate(found.models):
        at = f".models[{number}]"
        if (entry.name, entry.engine) in names:
            yield f"{at}.name", f"there is another model called {entry.name!r}"
        names.add((entry.name, entry.engine))
        if entry.slug in slugs:
            yield f"{at}.name", f"it and {slugs[entry.slug]!r} have one name as programs ({entry.slug}); choose another"
        slugs[entry.slug] = entry.name
        if entry.elsewhere:
            yield from _elsewhere(entry, at, base)
            continue
        for field in ("url", "key_file"):
            if getattr(entry, field):
                yield f"{at}.{field}", "is for engines that run elsewhere: trtllm, sglang, attached"
        if entry.source == BUNDLED:
            if entry.task != "chat":
                yield f"{at}.task", "the bundled model is for chat"
        elif entry.engine == "llamacpp":
            if entry.task != "chat":
                yield f"{at}.task", "engine: llamacpp is for chat here"
            if not _has_gguf(base / Path(entry.source).expanduser()):
                yield f"{at}.source", f"{entry.source} is neither a GGUF file nor a folder with one"
        elif not _is_folder(entry.source):
            if not _HUB.fullmatch(entry.source):
                yield f"{at}.source", f"{entry.source!r} is neither bundled, a folder, nor like org/model@revision"
        elif not (base / Path(entry.source).expanduser() / "config.json").is_file():
            yield f"{at}.source", f"there is no checkpoint (no config.json) in {entry.source}"
        try:
            shlex.split(entry.arguments)
        except ValueError as error:
            yield f"{at}.arguments", str(error)


def _elsewhere(entry: Entry, at: str, base: Path) -> Iterator[tuple[str, str]]:
    """What is wrong with an entry whose engine somebody else runs."""
    if not entry.url:
        yield at, f"engine: {entry.engine} needs the url of the server"
    if entry.start == "on_demand":
        yield f"{at}.start", "a server that runs elsewhere cannot be started on demand"
    if entry.replicas > 1:
        yield f"{at}.replicas", "one server at one url is one worker"
    if entry.key_file and not (base / Path(entry.key_file).expanduser()).is_file():
        yield f"{at}.key_file", f"there is no file {entry.key_file}"


def _has_gguf(path: Path) -> bool:
    return path.is_file() or any(path.glob("*.gguf"))


def _is_folder(source: str) -> bool:
    return source.startswith((".", "/", "~"))


def _absolute(entry: Entry, base: Path) -> Entry:
    if entry.elsewhere:
        key = str((base / Path(entry.key_file).expanduser()).resolve()) if entry.key_file else ""
        return msgspec.structs.replace(entry, key_file=key)
    if entry.source == BUNDLED or not (_is_folder(entry.source) or entry.engine == "llamacpp"):
        return entry
    return msgspec.structs.replace(entry, source=str((base / Path(entry.source).expanduser()).resolve()))


def _line(root: yaml.Node | None, field: str) -> int:
    """The line of a field like `.models[1].name`, or of the innermost part of it that is there."""
    node = root
    line = node.start_mark.line + 1 if node is not None else 1
    for name, number in _FIELD.findall(field):
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, value) for key, value in node.value if key.value == name]
            if not pairs:
                break
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        elif isinstance(node, yaml.SequenceNode) and number and int(number) < len(node.value):
            node = node.value[int(number)]
            line = node.start_mark.line + 1
        else:
            break
    return line


def schema() -> str:
    """The file's JSON schema."""
    made = msgspec.json.schema(Catalog)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "OwnGPT's models.yaml"}
    return json.dumps(head | made, indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema())
