"""The supervisor and its programs: started, watched until they answer, stopped."""

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import msgspec
from rich.progress import Progress
from supervisor.xmlrpc import SupervisorTransport

from common.files import write_whole
from services.local import catalog
from services.local.errors import UserError
from services.local.plan import BEFORE_MODELS_FILE, ROOT, Dials, Ports, read_dials
from services.local.programs import programs, supervisor_config
from services.local.workers import change, wanted, write

USUAL_START_S = 30.0
_CAUSE = re.compile(r"\b\w*(Error|Exception): \S|^(GPU|It does not fit|The NVIDIA driver)\b")
"""An error with its text, or what our own checks say."""
ONLY_HERE = ("WORKERS", "MODELS_FILE", "ADAPTERS_DIR", "HF_HOME", "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES")
"""Dials of `make up` that compose has not."""


@contextlib.contextmanager
def only_one(dials: Dials) -> Iterator[IO[str]]:
    """Hold the state folder's lock. Raises UserError when another `make up` has it."""
    with open(dials.state / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"A stack is already running from {dials.state}. Stop it with Ctrl-C, "
                            "or start a second one with another STATE_DIR and PORT.") from error
        yield lock


def start(dials: Dials, ports: Ports) -> subprocess.Popen[bytes]:
    """supervisord with all programs; it stops them when this process is gone."""
    workers = change([], wanted(dials), iter(ports.workers)).new
    write(dials, workers)
    remember(dials, ports)
    started = programs(dials, ports, workers)
    config = dials.run_dir / "supervisord.conf"
    write_whole([supervisor_config(dials, started).encode()], config)
    for program in started:
        (dials.state / "logs" / f"{program.name}.log").write_text("")
    tethered = [sys.executable, "-m", "services.local.tether", "--privileged"]
    return subprocess.Popen(
        [*tethered, sys.executable, "-m", "supervisor.supervisord", "-c", str(config)],
        cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )


class Told(msgspec.Struct):
    """What `make up` was told, for those who change the stack while it runs."""

    dials: dict[str, str]
    ports: Ports


def dial_names() -> list[str]:
    """Every dial there is, but for tokens: those are written nowhere."""
    offered = re.findall(r"^#?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.M)
    return [name for name in (*offered, *ONLY_HERE) if not name.endswith("TOKEN")]


def remember(dials: Dials, ports: Ports) -> None:
    """Write it down."""
    path = dials.run_dir / "up.json"
    path.touch(mode=0o600)
    said = Told({name: os.environ[name] for name in dial_names() if name in os.environ}, ports)
    path.write_bytes(msgspec.json.encode(said))


def recall(state: Path) -> tuple[Dials, Ports]:
    """The dials and ports of the stack that runs from a state folder; models.yaml as it is now. Raises UserError."""
    try:
        known = told(Dials(state))
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(f"There is no running stack in {state}; start it with: make up") from error
    for name in dial_names():
        os.environ.pop(name, None)
    os.environ.update(known.dials | {"STATE_DIR": str(state)})
    if catalog.models_path().exists():
        for name in BEFORE_MODELS_FILE:
            os.environ.pop(name, None)
    return read_dials(), known.ports


def supervisor_of(dials: Dials) -> Any:
    """The stack's supervisord; each call of it raises OSError or xmlrpc.client.Error when it does not answer."""
    transport = SupervisorTransport(None, None, f"unix://{dials.run_dir}/supervisor.sock")
    return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)


def inner(dials: Dials) -> str:
    """nginx' inner door: plain HTTP on the loopback, whatever clients are asked for. Raises UserError."""
    try:
        return f"http://127.0.0.1:{told(dials).ports.inner}"
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(f"There is no running stack in {dials.state}; start it with: make up") from error


def told(dials: Dials) -> Told:
    """What the stack was started with. Raises OSError, MsgspecError."""
    return msgspec.json.decode((dials.run_dir / "up.json").read_bytes(), type=Told)


def process_states(dials: Dials) -> dict[str, str]:
    """Program -> supervisord's state name; empty while supervisord is not up."""
    try:
        return {row["name"]: row["statename"] for row in supervisor_of(dials).supervisor.getAllProcessInfo()}
    except (OSError, xmlrpc.client.Error):
        return {}


def refuse_given_up(dials: Dials, only: str = "") -> None:
    """Raise UserError, with its last words, when a program, or this one, does not start or a worker's engine died."""
    for name, state in process_states(dials).items():
        if only not in ("", name):
            continue
        log = dials.state / "logs" / f"{name}.log"
        died = name.startswith("worker") and log.exists() and '"engine died"' in log.read_text(errors="replace")
        if state == "FATAL" or died:
            raise UserError(f"{name} does not start: {last_words(log)} ({log})")


def last_words(log: Path) -> str:
    """The most telling line of a log: its last error that names a cause, else its last line."""
    said = [_said(line) for line in log.read_text(errors="replace").splitlines() if line.strip()]
    causes = [text for text in said if _CAUSE.search(text) and "root cause above" not in text]
    return (causes or said or ["it says nothing"])[-1][:300]


def _said(line: str) -> str:
    """A line of a log; of a JSON line the end of its exception, its reason, or its event."""
    try:
        entry = json.loads(line)
        text = str(entry.get("exception") or entry.get("reason") or entry.get("event"))
    except (ValueError, AttributeError):
        text = line
    return next((part.strip() for part in reversed(text.splitlines()) if part.strip()), "")


def wait_until_ready(dials: Dials, supervisor: subprocess.Popen[bytes], progress: Progress) -> None:
    """Until every worker answers through nginx. Raises UserError with a program's last words when it gives up."""
    names_served = ", ".join(entry.name for entry in dials.catalog.models if entry.start == "always")
    task = progress.add_task(f"loading {names_served} on {dials.always} worker(s)", total=USUAL_START_S)
    while True:
        if supervisor.poll() is not None:
            raise UserError(f"The supervisor stopped; see {dials.state}/logs/supervisord.log.")
        with contextlib.suppress(httpx.HTTPError, ValueError):
            answer = httpx.get(f"{inner(dials)}/ready", timeout=1.0)
            if answer.json().get("workers", {}).get("ready", 0) >= dials.always:
                progress.update(task, completed=USUAL_START_S)
                return
        refuse_given_up(dials)
        if not progress.finished:
            progress.advance(task, 0.1)
        time.sleep(0.1)


def stop(supervisor: subprocess.Popen[bytes]) -> None:
    """Stop everything and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        supervisor.terminate()
    try:
        supervisor.wait(40)
    except subprocess.TimeoutExpired:
        supervisor.kill()
