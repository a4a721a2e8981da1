"""Parts of the jobs service for tests: its database (SQLite, or a real Postgres), files, batches with a scripted door."""

import asyncio
import contextlib
import glob
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from common.database import Database, DatabaseAway
from common.records import Record
from common.redis.names import USAGE
from services.jobs import tables
from services.jobs.app import MIGRATIONS
from services.jobs.batch import UNFINISHED, Batch, CreateBatch
from services.jobs.batches import Batches
from services.jobs.files import Files
from services.jobs.front_door import Answer
from services.jobs.leases import Leases
from services.jobs.means import Means
from services.jobs.metrics import JobsMetrics
from services.jobs.upload import Incoming
from tests.harness import Stack, free_ports, wait_for

CHAT = "/v1/chat/completions"
GOOD = Answer(200, {"usage": {"prompt_tokens": 1, "completion_tokens": 1}})
Found = TypeVar("Found")


class Dead(BaseException):
    """The process is gone; nothing of it runs on."""


class Mortal(Database):
    """A database whose process can be killed at any transaction, before or after its commit, and whose disk can be full."""

    def __init__(self, url: str) -> None:
        super().__init__(url, MIGRATIONS)
        self.fuse = -1
        """So many transactions still happen; -1: all."""
        self.after = False
        self.dead = False
        self.full = 0
        """So many transactions find the disk full."""

    def transact(self, work: Callable[..., Found]) -> Found:
        if self.dead:
            raise Dead
        if self.full:
            self.full -= 1
            raise DatabaseAway("database or disk is full")
        if self.fuse == 0:
            self.dead = True
            if self.after:
                super().transact(work)
            raise Dead
        self.fuse -= self.fuse > 0
        return super().transact(work)


def database(folder: Path, kind: type[Database] = Database, url: str = "") -> Database:
    url = url or f"sqlite:///{folder}/jobs.db"
    made = Mortal(url) if kind is Mortal else Database(url, MIGRATIONS)
    made.migrate()
    return made


class Door:
    """Answers as scripted, one after the other, the last one for ever. What it computes is recorded, as the gateway's is."""

    def __init__(self, *script: Answer, redis: Redis | None = None) -> None:
        self.script, self.redis = list(script), redis
        self.asked: list[tuple[str, str]] = []
        self.billed: list[str] = []

    async def __call__(self, endpoint: str, body: bytes, owner: str, request_id: str, payer: str = "") -> Answer:
        self.asked.append((owner, payer))
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if self.redis is not None and (answer.status == 200 or answer == Answer(502, None)):
            if not payer:
                self.billed.append(request_id)
            record = Record(id="u", request_id=request_id, key=payer or owner, model="m", route="chat", worker="w",
                            started_at=0.0, batch=True, outcome="ok")
            await self.redis.xadd(USAGE, {"r": msgspec.json.encode(record)})
        await asyncio.sleep(0)
        return answer


def redis_of(stack: Stack, user: str = "jobs") -> Redis:
    password = (stack.dials.secrets / user / "redis_password").read_text().strip()
    return Redis.from_url(stack.dials.redis_url, username=user, password=password, decode_responses=True)


def incoming(files: Files, data: bytes) -> Incoming:
    """An upload that has come whole."""
    found = Incoming(files.folder)
    found.write(data)
    return found


class Service:
    """The batches of one jobs process."""

    def __init__(self, database: Database, folder: Path, redis: Redis, door: Door, room: int = 4, max_waiting: int = 100) -> None:
        self.database, self.files = database, Files(database, folder, 10_000_000, 1000)
        self.means = Means(database, self.files, redis, door, lambda: {"m"}, lambda n: n < room,
                           JobsMetrics(CollectorRegistry()))
        self.leases = Leases(database, tables.batches, UNFINISHED)
        self.batches = Batches(self.means, self.leases, max_waiting)

    async def upload(self, lines: int, owner: str = "owner") -> str:
        rows = [{"custom_id": f"c{i}", "method": "POST", "url": CHAT, "body": {"model": "m", "messages": []}} for i in range(lines)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        return (await self.files.add(incoming(self.files, text.encode()), "in.jsonl", "batch", owner)).id

    async def create(self, file_id: str, owner: str = "owner") -> Batch:
        asked = CreateBatch(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
        return await self.batches.create(asked, owner)

    async def over(self, batch_id: str, within_s: float = 15.0) -> Batch:
        """The batch at its end."""
        for _ in range(int(within_s / 0.02)):
            now = await self.batches.get(batch_id, "owner")
            if now.status not in UNFINISHED:
                return now
            await asyncio.sleep(0.02)
        raise AssertionError(f"not over: {now}")

    def rows(self, file_id: str | None) -> list[dict]:
        return [json.loads(line) for line in (self.files.folder / file_id).read_text().splitlines()] if file_id else []


def find_postgres() -> str | None:
    """The folder of Debian's newest Postgres."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
    return str(Path(found[-1]).parent) if found else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A real Postgres with an empty database; its URL. It refuses to run as root, so root lends it a user."""
    bin_dir = find_postgres()
    assert bin_dir is not None
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    as_user: list[str] = []
    if os.getuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
    port = free_ports(1)[0]
    quiet = {"stdout": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run([*as_user, f"{bin_dir}/initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "owngpt", "-N"], check=True, **quiet)
    server = subprocess.Popen([*as_user, f"{bin_dir}/postgres", "-D", f"{folder}/data", "-k", str(folder), "-p", str(port),
                               "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"], stderr=subprocess.DEVNULL, **quiet)
    try:
        ready = [f"{bin_dir}/pg_isready", "-h", "127.0.0.1", "-p", str(port)]
        wait_for(lambda: subprocess.run(ready, check=False, **quiet).returncode == 0, "Postgres up", 30)
        yield f"postgresql+psycopg://owngpt@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait(20)
        shutil.rmtree(folder, ignore_errors=True)
