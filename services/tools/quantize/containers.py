"""`make quantize-compose`: `make quantize` for a host with Docker alone; the work is done in a container.

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from services.local import catalog
from services.local import model as bundled
from services.local.catalog import BUNDLED
from services.local.compose import IN_IMAGE, OWN, ROOT, dial, in_container, models_path, own_models
from services.local.errors import UserError
from services.tools.quantize import source
from services.tools.quantize.register import register

USER = 10001
"""Of all containers; theirs is MODELS_DIR when it was root's."""
HAVE_GPUS = ("worker", "trainer", "trtllm", "sglang")


def quantize(model: str, method: str, data: str, most_loss: float) -> None:
    """Raises UserError: a wrong input, or a container that cannot do it and has said why."""
    path, own = models_path(), own_models()
    known = catalog.read(path).models if path.exists() else []
    entry = source.find(on_this_host(model or ("" if known else served()), own), method, known)
    copy = source.copy_of(entry, method, own / source.copy_name(entry, method))
    inside = in_container(entry, own)
    on_gpus = dial("ACCELERATOR", "cpu") == "cuda"
    if on_gpus:
        if entry.source == BUNDLED:
            raise UserError("The image for GPUs has no bundled model. MODEL=org/model, or a name in models.yaml.")
        _stopped()
    if inside.model(IN_IMAGE).startswith("/"):
        inside = msgspec.structs.replace(inside, source=inside.model(IN_IMAGE))
    elif _compose("run", "--rm", "fetch", inside.source):
        raise UserError(f"{inside.source} is not here; see above.")
    with _lent(own, data) as (user, rows):
        told = {"ENTRY": json.dumps(msgspec.to_builtins(inside)), "METHOD": method, "DATA": rows}
        told |= {"MAX_PERPLEXITY_LOSS": str(most_loss)}
        variables = [part for name, value in told.items() for part in ("-e", f"{name}={value}")]
        if _compose("--profile", "tools", "run", "--rm", "--user", user, *variables, "quantize"):
            raise UserError(f"No {copy.name} was registered; see above.")
    new = register(path, copy, entry)
    print(
        f"{copy.source}: the checkpoint, its card README.md\n"
        f"{path}: {'has' if new else 'had'} an entry {copy.name!r}. Serve it: make apply-compose"
    )


def served() -> str:
    """What compose serves where no models.yaml says it: MODEL of .env, or its default. Raises UserError."""
    done = subprocess.run(
        ["docker", "compose", "config", "--format", "json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"docker compose config: {done.stderr.strip()}")
    return str(json.loads(done.stdout)["services"]["worker"]["environment"]["MODEL"])


def on_this_host(model: str, own: Path) -> str:
    """MODEL as make quantize takes it, of one that is said as containers see it (.env)."""
    folder = Path(model)
    if folder == IN_IMAGE / bundled.NAME:
        return BUNDLED
    return str(own / folder.relative_to(OWN)) if folder.is_relative_to(OWN) else model


def _stopped() -> None:
    """Raise UserError while others have the GPUs' memory."""
    done = subprocess.run(
        ["docker", "compose", "ps", "--services", "--status", "running"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    running = [name for name in done.stdout.split() if name.startswith(HAVE_GPUS)]
    if running:
        raise UserError(f"The gate needs the GPU: docker compose stop {' '.join(running)}; start them again afterwards")


@contextmanager
def _lent(own: Path, data: str) -> Iterator[tuple[str, str]]:
    """(user:group that has MODELS_DIR, where the container sees a copy of DATA). Raises UserError."""
    try:
        own.mkdir(parents=True, exist_ok=True)
        if own.stat().st_uid == 0 == os.geteuid():
            os.chown(own, USER, USER)
        uid, gid = own.stat().st_uid, own.stat().st_gid
        if uid == 0:
            raise UserError(f"{own} (MODELS_DIR) is root's. Make it yours: sudo chown $(id -u):$(id -g) {own}")
        with tempfile.TemporaryDirectory(prefix=".quantizing-", dir=own) as work:
            rows = Path(work, "rows.jsonl")
            if data:
                shutil.copyfile(data, rows)
            if os.geteuid() == 0:
                for lent in (Path(work), *Path(work).iterdir()):
                    os.chown(lent, uid, gid)
            yield f"{uid}:{gid}", str(OWN / rows.relative_to(own)) if data else ""
    except OSError as error:
        raise UserError(f"{error.filename or own}: {error.strerror}") from error


def _compose(*arguments: str) -> int:
    """The status of a docker compose that has the terminal. An interrupt is its affair: it passes it on, and ends."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return subprocess.run(["docker", "compose", *arguments], cwd=ROOT, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    """The command: MODEL, METHOD, DATA, MAX_PERPLEXITY_LOSS in the environment, as make quantize takes them."""
    told = os.environ
    try:
        quantize(
            told.get("MODEL", ""),
            told.get("METHOD", "").strip().lower(),
            told.get("DATA", ""),
            float(told.get("MAX_PERPLEXITY_LOSS") or 0.05),
        )
    except (UserError, ValueError) as error:
        sys.exit(f"owngpt: {error}")


if __name__ == "__main__":
    main()
