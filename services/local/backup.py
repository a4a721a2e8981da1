"""`make backup` and `make restore`: keys, usage, files, jobs, batches, tuned models, aliases in one archive.

    backup.json         keys, the registries of adapters and aliases          usage.jsonl     the usage stream
    jobs.db, ledger.db  the databases, as of one moment each                  api_key         the first key
    files/ adapters/ runs/                                                    what belongs to them

The stack may run meanwhile. What names something is copied before what it names, so nothing in an archive is named
before it was there; what was deleted in between is left out at the restore. Passwords are no part of it: a restored
stack makes its own.
"""

import contextlib
import io
import json
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from common.adapters import read_registry
from common.files import sync_folder
from common.redis.names import ADAPTERS, ALIASES, USAGE, api_key_key
from services.local.errors import UserError
from services.local.plan import ROOT, Dials
from services.local.programs import redis_servers

DATABASES = ("jobs.db", "ledger.db")
FOLDERS = ("files", "adapters", "runs")
FORMAT = 1
PAGE = 5000
REDIS_STARTS_S = 60.0


def backup(dials: Dials, archive: Path, say: Callable[[str], None]) -> None:
    """Write an archive, all of it or nothing. Raises UserError, OSError."""
    if not (dials.state / "jobs.db").exists():
        raise UserError(f"There is nothing to back up in {dials.state}: no stack has run from it (with SQLite).")
    partial = archive.with_name(archive.name + ".partial")
    scratch = dials.state / "backup.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)
    try:
        with redis_running(dials), tarfile.open(partial, "w:gz", compresslevel=1) as tar:
            partial.chmod(0o600)
            for name in DATABASES:
                say(name)
                copy_database(dials.state / name, scratch / name)
                tar.add(scratch / name, name)
            say("keys, models, aliases, usage")
            (scratch / "backup.json").write_text(json.dumps(registries(dials)))
            write_usage(dials, scratch / "usage.jsonl")
            for path in (scratch / "backup.json", scratch / "usage.jsonl", dials.state / "api_key"):
                tar.add(path, path.name)
            for name in FOLDERS:
                say(f"{name}/")
                add_folder(tar, dials.state / name, name)
        partial.rename(archive)
        sync_folder(archive.absolute().parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        partial.unlink(missing_ok=True)


def restore(dials: Dials, archive: Path, say: Callable[[str], None]) -> None:
    """Make a state folder out of an archive. Raises UserError, OSError."""
    if any((dials.state / name).exists() for name in (*DATABASES, "redis/appendonlydir", "api_key")):
        raise UserError(f"{dials.state} has a stack's state already; restore into an empty place: STATE_DIR=…")
    places = (dials.state / name for name in (*DATABASES, *FOLDERS, "redis", "api_key", "backup.json", "usage.jsonl"))
    ours = [path for path in places if not path.exists()]
    try:
        unpack(dials, archive, say)
    except BaseException:  # a full disk, Ctrl-C: the place is as empty as it was
        for path in ours:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def unpack(dials: Dials, archive: Path, say: Callable[[str], None]) -> None:
    """Fill an empty state folder. Raises UserError, OSError."""
    say("reading")
    try:
        with tarfile.open(archive) as tar:
            whole = tar.getnames()  # to the end of it, before anything is written
            known = json.load(tar.extractfile("backup.json") or io.BytesIO())
            if known["format"] != FORMAT:
                raise UserError(f"{archive} has format {known['format']}; this release reads {FORMAT}.")
            say(f"unpacking {len(whole)} files")
            dials.state.mkdir(parents=True, exist_ok=True)
            dials.state.chmod(0o700)
            tar.extractall(dials.state, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{archive} is no archive of make backup: {error}") from error
    say("keys, models, aliases, usage")
    folders = {path.name for path in (dials.state / "adapters").iterdir()}
    there = {name for name, adapter in read_registry(known["adapters"]).items() if adapter.folder in folders}
    adapters = {name: raw for name, raw in known["adapters"].items() if name in there}
    with redis_running(dials):
        with client(dials, "gateway") as redis:
            for key_id, raw in known["keys"].items():
                redis.set(api_key_key(key_id), raw)
            with open(dials.state / "usage.jsonl") as lines, redis.pipeline(transaction=False) as pipe:
                for number, line in enumerate(lines, 1):
                    entry, fields = json.loads(line)
                    pipe.xadd(USAGE, fields, id=entry)
                    if number % PAGE == 0:
                        pipe.execute()
                pipe.execute()
        with client(dials, "jobs") as redis:
            for name, entries in ((ADAPTERS, adapters), (ALIASES, known["aliases"])):
                if entries:
                    redis.hset(name, mapping=entries)
    for name in ("backup.json", "usage.jsonl"):
        (dials.state / name).unlink()


def registries(dials: Dials) -> dict[str, Any]:
    """What redis holds that is not recomputed, but for the usage stream."""
    with client(dials, "gateway") as redis:
        names = list(redis.scan_iter(match=api_key_key("*"), count=1000))
        keys = {name.removeprefix(api_key_key("")): redis.get(name) for name in names}
    with client(dials, "jobs") as redis:
        adapters, aliases = redis.hgetall(ADAPTERS), redis.hgetall(ALIASES)
    return {"format": FORMAT, "at": time.time(), "keys": keys, "adapters": adapters, "aliases": aliases}


def write_usage(dials: Dials, path: Path) -> None:
    """The usage stream, an entry a line."""
    last = "-"
    with client(dials, "gateway") as redis, open(path, "w") as file:
        while entries := redis.xrange(USAGE, min=last, count=PAGE):
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
            last = f"({entries[-1][0]}"


def copy_database(source: Path, target: Path) -> None:
    """A database as of one moment, while others write."""
    with (
        contextlib.closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=60)) as there,
        contextlib.closing(sqlite3.connect(target)) as here,
    ):
        there.backup(here, pages=1000)


def add_folder(tar: tarfile.TarFile, folder: Path, name: str) -> None:
    """A folder and what is in it; what is deleted meanwhile is left out, and what is half-written."""
    tar.add(folder, name, recursive=False)
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".partial" or ".partial" in path.parent.name:
            continue
        with contextlib.suppress(FileNotFoundError):
            tar.add(path, f"{name}/{path.relative_to(folder)}", recursive=False)


def client(dials: Dials, user: str) -> Redis:
    """The state redis with a service's rights."""
    password = (dials.secrets / user / "redis_password").read_text().strip()
    return Redis.from_url(dials.redis_url, username=user, password=password, decode_responses=True)


@contextlib.contextmanager
def redis_running(dials: Dials) -> Iterator[None]:
    """With the running stack's redis, else with one for the moment. Raises UserError when it does not start."""
    if dials.secrets.exists() and answers(dials):
        yield
        return
    subprocess.run([sys.executable, "-m", "services.secrets", str(dials.secrets)], cwd=ROOT, check=True)
    for folder in (dials.state / "redis", dials.state / "logs", dials.run_dir):
        folder.mkdir(exist_ok=True)
    with open(dials.state / "logs/redis.log", "ab") as log:
        process = subprocess.Popen(redis_servers(dials)[0].command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + REDIS_STARTS_S
        while not answers(dials):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"redis does not start; see {dials.state}/logs/redis.log")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(60)


def answers(dials: Dials) -> bool:
    """Whether the state redis is there and has read what it has."""
    with contextlib.suppress(RedisError, OSError), client(dials, "gateway") as redis:
        return bool(redis.ping())
    return False
