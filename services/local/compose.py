"""models.yaml for compose: a file beside compose.yaml with one service a worker. `python -m services.local.compose`.

Needs PyYAML and msgspec alone, so that a host with Docker needs no more: `make apply-compose` makes an environment.
A changed entry is a service of another name: compose starts it beside the old one; `--remove-orphans` then ends that.
"""

import os
import re
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import yaml

from common.files import write_whole
from services.local import catalog, places
from services.local.catalog import ROOT, Catalog, Entry
from services.local.errors import UserError
from services.local.places import Place

FILE = ROOT / "models.compose.yaml"
WANTED = ROOT / "models.wanted"
IN_IMAGE = Path("/models")
OWN = Path("/models/own")
KEY_FILE = Path("/run/secrets/engine_key")
HEAD = "# Made from models.yaml by `make apply-compose`; change that file, not this one. COMPOSE_FILE names it.\n"


class Override(dict[str, Any]):
    """A mapping that takes the place of the one in the file below, instead of being merged with it."""


class Dumper(yaml.SafeDumper):
    """Knows `!override`."""


Dumper.add_representer(Override, lambda dumper, data: dumper.represent_mapping("!override", data))


def document(found: Catalog, gpus: int, own: Path, file: str = "./models.yaml") -> dict[str, Any]:
    """The file. `own`: MODELS_DIR, which containers see as /models/own.

    Raises UserError for a folder that containers cannot see, and when there are too few GPUs.
    """
    services: dict[str, Any] = {"worker": {"profiles": ["without-models-yaml"]}}
    dealt = places.deal(found, range(gpus))
    for entry in found.models:
        inside = in_container(entry, own)
        for number, place in enumerate(dealt[entry.slug], 1):
            env = {"PLACE": ""} | places.environment(inside, IN_IMAGE, place, found.awake)  # else hardware.yaml's
            for name in places.visible(()):
                env.pop(name, None)  # the container has no others
            mark = sha256(repr(sorted(env.items())).encode() + repr(place).encode()).hexdigest()[:4]
            services[f"worker-{entry.slug}-{number}-{mark}"] = _service(env, place, entry.key_file, gpus=gpus)
    # What it is to bring stands in a file: in its configuration, a change would start all that wait for it anew.
    services["fetch"] = {"volumes": [f"{file}:/models.yaml:ro", f"./{WANTED.name}:/models.wanted:ro"]}
    trained = found.trained
    services["trainer"] = (
        {"profiles": ["without-models-yaml"]} if trained is None
        else _trainer(in_container(trained, own), dealt[trained.slug][0])
    )
    return {"services": services}


def _service(env: dict[str, str], place: Place, key_file: str, *, gpus: int) -> dict[str, Any]:
    made: dict[str, Any] = {
        "extends": {"file": "compose.yaml", "service": "worker"},
        "environment": env,
        "networks": {"backend": {"aliases": ["worker"]}},  # by which Prometheus finds it
    }
    if place.gpus:
        made["deploy"] = _devices(place.gpus)
    elif gpus:
        made["deploy"] = Override()  # it needs none
    if key_file:
        env["ENGINE_KEY_FILE"] = str(KEY_FILE)
        made["volumes"] = [f"{key_file}:{KEY_FILE}:ro"]
    return made


def _trainer(entry: Entry, place: Place) -> dict[str, Any]:
    """On the first GPU of the model that it trains, which it has for itself meanwhile."""
    env = {"MODEL": entry.model(IN_IMAGE), "MODEL_REVISION": entry.revision, "SERVED_MODEL_NAME": entry.name}
    if not place.gpus:
        return {"environment": env}
    return {"environment": env | {"PLACE": place.name}, "deploy": _devices(place.gpus[:1])}


def _devices(gpus: tuple[int, ...]) -> Override:
    device = {"driver": "nvidia", "device_ids": [str(gpu) for gpu in gpus], "capabilities": ["gpu"]}
    return Override(resources={"reservations": {"devices": [device]}})


def in_container(entry: Entry, own: Path) -> Entry:
    """The entry with its folder as containers see it. Raises UserError for one that they do not."""
    if entry.elsewhere or not entry.source.startswith("/"):
        return entry
    folder = Path(entry.source)
    if not folder.is_relative_to(own):
        raise UserError(f"{entry.name}: containers do not see {folder}. Move it below {own} (MODELS_DIR).")
    return msgspec.structs.replace(entry, source=str(OWN / folder.relative_to(own)))


def wanted(path: Path, own: Path) -> str:
    """What `fetch` is to bring, a model a line, after the digest of the models.yaml that says so. Raises UserError."""
    models = [
        in_container(entry, own).model(IN_IMAGE) + (f"@{entry.revision}" if entry.revision else "")
        for entry in catalog.read(path).models if entry.engine == "vllm"
    ]  # fmt: skip
    return "\n".join([sha256(path.read_bytes()).hexdigest()[:12], *dict.fromkeys(models)]) + "\n"


def text(path: Path, gpus: int, own: Path) -> str:
    """The file as text. Raises UserError."""
    made = document(catalog.read(path), gpus, own, str(path.resolve()))
    return HEAD + yaml.dump(made, Dumper=Dumper, sort_keys=False, width=120)


def dial(name: str, default: str, env: Path = ROOT / ".env") -> str:
    """A dial from the environment or from .env."""
    if name in os.environ:
        return os.environ[name] or default
    said = re.findall(rf"^{name}=(.*)$", env.read_text(), re.M) if env.exists() else []
    return (said[-1].strip().strip("\"'") if said else "") or default


def name_it(env: Path) -> None:
    """Let compose read the file too: COMPOSE_FILE in .env, unless it says so."""
    line = f"COMPOSE_FILE=compose.yaml:{FILE.name}\n"
    said = env.read_text() if env.exists() else ""
    if chosen := dial("COMPOSE_FILE", "", env):
        if FILE.name not in chosen:
            raise UserError(f"COMPOSE_FILE={chosen} (the environment or {env}): add :{FILE.name} to it.")
        return
    with open(env, "a") as file:  # never written anew: it is its owner's
        file.write(("" if said.endswith("\n") or not said else "\n") + line)


def main() -> None:
    """Write it. GPUS says how many GPUs the host has."""
    path = catalog.models_path()
    try:
        if not path.exists():
            raise UserError(f"There is no {path}; begin with: cp examples/models.yaml models.yaml")
        gpus = int(os.environ.get("GPUS") or 0) if dial("ACCELERATOR", "cpu") == "cuda" else 0
        own = (ROOT / dial("MODELS_DIR", "./models")).resolve()
        for file, made in ((WANTED, wanted(path, own)), (FILE, text(path, gpus, own))):
            write_whole([made.encode()], file)
        name_it(ROOT / ".env")
    except UserError as error:
        sys.exit(f"owngpt: {error}")
    print(f"{FILE.name} is as {path.name} says.")


if __name__ == "__main__":
    main()
