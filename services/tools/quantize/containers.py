"""`make quantize-compose`: `make quantize` for a host with Docker; the work is done in a container.

Needs PyYAML and msgspec, as services/local/compose.py does. The container sees MODELS_DIR and downloaded models, has no
network, and is whoever has MODELS_DIR; models.yaml is changed here, when it has ended well.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from common.checkpoint import served_name
from services.local import catalog
from services.local import model as bundled
from services.local.catalog import BUNDLED, ROOT, Entry, models_path
from services.local.compose import IN_IMAGE, OWN, in_container
from services.local.errors import UserError
from services.tools.quantize import source
from services.tools.quantize.register import check, register

USER = 10001
"""Of all containers; theirs is MODELS_DIR when it was root's."""
HAVE_GPUS = ("worker", "trainer", "trtllm", "sglang")
ROWS = "/rows.jsonl"
KILLED = 137


class Composed(NamedTuple):
    """What compose makes of compose.yaml and .env."""

    own: Path
    """MODELS_DIR."""
    on_gpus: bool
    worker: Mapping[str, str]
    """The environment of the worker that it serves with; empty where models.yaml says which there are."""


def quantize(model: str, method: str, data: str, most_loss: float) -> None:
    """Raises UserError: a wrong input, or a container that cannot do it and has said why."""
    path, composed = models_path(), look()
    known = catalog.read(path).models if path.exists() else []
    entry = chosen(model, method, known, composed)
    copy = source.copy_of(entry, method, composed.own / source.copy_name(entry, method))
    check(path, copy)
    inside = in_container(entry, composed.own)
    if composed.on_gpus:
        _has_gpus(entry)
    with _lent(composed.own, data) as (user, mounts):
        if inside.model(IN_IMAGE).startswith("/"):
            inside = msgspec.structs.replace(inside, source=inside.model(IN_IMAGE))
        elif _compose("run", "--rm", "fetch", inside.source):
            raise UserError(f"{inside.source} is not here; see above.")
        told = {"ENTRY": json.dumps(msgspec.to_builtins(inside)), "METHOD": method, "DATA": ROWS if data else ""}
        told |= {"MAX_PERPLEXITY_LOSS": str(most_loss), "MODELS_DIR": str(composed.own)}
        variables = [part for name, value in told.items() for part in ("-e", f"{name}={value}")]
        options = ("--rm", "--build", "--user", user, *mounts, *variables)
        if status := _compose("--profile", "tools", "run", *options, "quantize"):
            why = "it was killed: more than WORKER_MEMORY?" if status == KILLED else "see above"
            raise UserError(f"No {copy.name} was registered; {why}.")
    new = register(path, copy, entry)
    print(
        f"{copy.source}: the checkpoint, its card README.md\n"
        f"{path}: {'has' if new else 'had'} an entry {copy.name!r}. Serve it: make apply-compose"
    )


def look() -> Composed:
    """Ask compose. Raises UserError."""
    found = json.loads(_asked("--profile", "tools", "config", "--format", "json"))["services"]
    own = next(Path(one["source"]).resolve() for one in found["quantize"]["volumes"] if one["target"] == str(OWN))
    return Composed(own, "deploy" in found["quantize"], found.get("worker", {}).get("environment", {}))


def chosen(model: str, method: str, known: Sequence[Entry], composed: Composed) -> Entry:
    """What MODEL names; nothing: the first of models.yaml, else what compose serves. Raises UserError."""
    ours = [one for one in known if one.engine == "vllm"]
    if model or ours:
        said = on_this_host(model or ours[0].name, composed.own)
        return source.find(said, method, known, os.environ.get("MODEL_REVISION", ""))
    if not composed.worker:
        raise UserError("MODEL=(nothing), and neither models.yaml nor compose.yaml serves one. MODEL=org/model")
    worker = {"MODEL_REVISION": "", "SERVED_MODEL_NAME": "", **composed.worker}
    found = source.find(on_this_host(worker["MODEL"], composed.own), method, known, worker["MODEL_REVISION"])
    return source.checked(msgspec.to_builtins(found) | {
        "name": served_name(worker["SERVED_MODEL_NAME"], worker["MODEL"]),
        "gpus": int(worker.get("TENSOR_PARALLEL_SIZE") or 1),
    })  # fmt: skip


def on_this_host(model: str, own: Path) -> str:
    """MODEL as make quantize takes it, of one that is said as containers see it (.env)."""
    folder = Path(model)
    if folder == IN_IMAGE / bundled.NAME:
        return BUNDLED
    return str(own / folder.relative_to(OWN)) if folder.is_relative_to(OWN) else model


def _has_gpus(entry: Entry) -> None:
    """Raise UserError while others have the GPUs' memory, and for a model that this image has not."""
    if entry.source == BUNDLED:
        raise UserError("The image for GPUs has no bundled model. MODEL=org/model, or a name in models.yaml.")
    running = [name for name in _asked("ps", "--services", "--status", "running").split() if name.startswith(HAVE_GPUS)]
    if running:
        raise UserError(f"The gate needs the GPU: docker compose stop {' '.join(running)}; start them again afterwards")


@contextmanager
def _lent(own: Path, data: str) -> Iterator[tuple[str, list[str]]]:
    """(user:group that has MODELS_DIR, the mount of a copy of DATA that it can read). Raises UserError."""
    me = os.geteuid()
    try:
        own.mkdir(parents=True, exist_ok=True)
        if own.stat().st_uid == 0 == me:
            os.chown(own, USER, USER)
        has = own.stat()
        if me not in (0, has.st_uid):
            raise UserError(f"{own} (MODELS_DIR) is not yours: sudo chown $(id -u):$(id -g) {own}")
        if has.st_uid != USER and has.st_mode & 0o005 != 0o005:
            raise UserError(f"Workers (user {USER}) cannot read {own} (MODELS_DIR): chmod o+rx {own}")
        with tempfile.TemporaryDirectory(prefix="owngpt-") as work:
            rows = Path(work, "rows.jsonl")
            if data:
                shutil.copyfile(data, rows)
                rows.chmod(0o400)
                if me == 0:
                    os.chown(rows, has.st_uid, has.st_gid)
            yield f"{has.st_uid}:{has.st_gid}", ["-v", f"{rows}:{ROWS}:ro"] if data else []
    except OSError as error:
        raise UserError(f"{error.filename or own}: {error.strerror or error}") from error


def _asked(*arguments: str) -> str:
    """What a docker compose says. Raises UserError."""
    line = ["docker", "compose", *arguments]
    try:
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"docker: {error.strerror}") from error
    if done.returncode:
        raise UserError(f"docker compose {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def _compose(*arguments: str) -> int:
    """The status of a docker compose that has the terminal. An interrupt is its affair: it passes it on, and ends."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return subprocess.run(["docker", "compose", *arguments], cwd=ROOT, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def _loss(said: str) -> float:
    """MAX_PERPLEXITY_LOSS. Raises UserError."""
    try:
        if (found := float(said or 0.05)) >= 0:
            return found
    except ValueError:
        pass
    raise UserError(f"MAX_PERPLEXITY_LOSS={said}: a share that is not negative, like 0.05 for five percent.")


def main() -> None:
    """The command: MODEL, METHOD, DATA, MAX_PERPLEXITY_LOSS in the environment, as make quantize takes them."""
    told = os.environ
    method = told.get("METHOD", "").strip().lower()
    try:
        quantize(told.get("MODEL", ""), method, told.get("DATA", ""), _loss(told.get("MAX_PERPLEXITY_LOSS", "")))
    except UserError as error:
        sys.exit(f"owngpt: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
