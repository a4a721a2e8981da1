"""Batches and the door they ask at: answers that break off, cannot be read, or never come; with a real redis, a scripted door."""

import asyncio
import errno
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from redis.exceptions import TimeoutError as RedisTimeout

from common.auth import HOUSE
from common.feed import Feed
from common.records import Record
from common.redis.names import USAGE
from common.workers import WorkerTable
from services.jobs.app import Tending
from services.jobs.batch import CreateBatch
from services.jobs.batch_results import Result, Results
from services.jobs.batches import Batches
from services.jobs.files import Files
from services.jobs.front_door import Answer, FrontDoor
from services.jobs.metrics import JobsMetrics
from tests.harness import Stack, running

GOOD = Answer(200, {"usage": {"prompt_tokens": 1, "completion_tokens": 1}})


@pytest.fixture(scope="module")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("door")) as stack:
        yield stack


class Door:
    """Answers as scripted, one after the other, the last one for ever. Knows who paid."""

    def __init__(self, *script: Answer, records: Redis | None = None) -> None:
        self.script, self.records = list(script), records
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, endpoint: str, body: bytes, owner: str, request_id: str, payer: str = "") -> Answer:
        self.asked.append((owner, payer))
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if answer.status == 502 and self.records is not None:  # computed and recorded; then the connection broke
            record = Record(id="u", request_id=request_id, key=owner, model="m", route="chat", worker="w", started_at=0.0,
                            batch=True, outcome="ok")
            await self.records.xadd(USAGE, {"r": msgspec.json.encode(record)})
        await asyncio.sleep(0)
        return answer


async def batch(floor: Stack, folder: Path, door: Door, lines: int = 1, cancel_after_s: float = 0.0) -> tuple[object, list[dict], list[dict]]:
    """(the batch at its end, its results, its failures)."""
    password = (floor.dials.secrets / "jobs/redis_password").read_text().strip()
    redis = Redis.from_url(floor.dials.redis_url, username="jobs", password=password, decode_responses=True)
    files = Files(redis, folder, 10_000_000, 1000)
    batches = Batches(redis, files, folder / "batches", door, lambda: {"m"}, lambda n: n < 4, JobsMetrics(CollectorRegistry()))
    rows = [{"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": []}} for i in range(lines)]
    file = await files.add(io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode()), "in.jsonl", "batch", "owner")
    made = await batches.create(CreateBatch(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"), "owner")
    if cancel_after_s:
        await asyncio.sleep(cancel_after_s)
        await batches.cancel(await batches.get(made.id, "owner"))
    for _ in range(300):
        now = await batches.get(made.id, "owner")
        if now.status in ("completed", "failed", "cancelled", "expired"):
            break
        await asyncio.sleep(0.05)
    await batches.close()
    await redis.aclose()
    shown = [[json.loads(line) for line in (folder / each).read_text().splitlines()] if each else []
             for each in (now.output_file_id, now.error_file_id)]
    return now, shown[0], shown[1]


def test_every_line_once(floor: Stack, tmp_path: Path) -> None:
    door = Door(GOOD)
    now, good, bad = asyncio.run(batch(floor, tmp_path, door, lines=50))
    assert (now.status, now.completed, now.failed) == ("completed", 50, 0)  # type: ignore[attr-defined]
    assert len({row["custom_id"] for row in good}) == 50
    assert bad == []
    assert door.asked == [("owner", "")] * 50


def test_an_answer_that_cannot_be_read_fails_its_line_and_is_not_asked_again(floor: Stack, tmp_path: Path) -> None:
    """It counted as `nobody there`, and was computed again every half second for a day."""
    door = Door(Answer(200, None))
    now, _, bad = asyncio.run(batch(floor, tmp_path, door))
    assert (now.status, now.completed, now.failed) == ("completed", 0, 1)  # type: ignore[attr-defined]
    assert bad[0]["error"]["code"] == "unreadable_answer"
    assert len(door.asked) == 1


def test_an_answer_that_broke_off_after_it_was_recorded_is_paid_once(floor: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.jobs.batches.RETRY_S", 0.05)

    async def run() -> Door:
        password = (floor.dials.secrets / "worker/redis_password").read_text().strip()
        records = Redis.from_url(floor.dials.redis_url, username="worker", password=password, decode_responses=True)
        door = Door(Answer(502, None), GOOD, records=records)
        now, good, _ = await batch(floor, tmp_path, door)
        assert (now.status, len(good)) == ("completed", 1)  # type: ignore[attr-defined]
        await records.aclose()
        return door

    assert asyncio.run(run()).asked == [("owner", ""), ("owner", HOUSE)]


def test_a_disk_that_is_full_for_a_moment_loses_and_doubles_no_line(floor: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, failed = os.fsync, []

    def full_at_first(fd: int) -> None:
        if "batches" in os.readlink(f"/proc/self/fd/{fd}") and len(failed) < 2:
            failed.append(fd)
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    monkeypatch.setattr(os, "fsync", full_at_first)
    door = Door(GOOD)
    ended, good, bad = asyncio.run(batch(floor, tmp_path, door, lines=12))
    assert len(failed) == 2
    assert (ended.status, ended.completed, bad) == ("completed", 12, [])
    assert sorted(row["custom_id"] for row in good) == sorted(f"c{i}" for i in range(12))


def test_what_the_disk_did_not_take_is_written_once_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, results = os.fsync, Results(tmp_path / "good", tmp_path / "bad")
    results.add(Result(True, {"custom_id": "a"}))
    results.add(Result(False, {"custom_id": "b"}))

    def full(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("bad"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        results.flush()
    assert (tmp_path / "bad").read_bytes() == b""
    monkeypatch.setattr(os, "fsync", sync)
    assert (results.flush(), results.completed, results.failed) == (1, 1, 1)
    assert [json.loads((tmp_path / name).read_text())["custom_id"] for name in ("good", "bad")] == ["a", "b"]


def test_a_bug_while_a_batch_runs_forgets_no_batch(floor: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyError of ours is no sign that there is no such batch."""
    recover, tries = Results.recover, []

    def fails_at_first(results: Results) -> None:
        tries.append(results)
        if len(tries) == 1:
            raise KeyError("r")
        recover(results)

    monkeypatch.setattr(Results, "recover", fails_at_first)
    ended, good, _ = asyncio.run(batch(floor, tmp_path, Door(GOOD)))
    assert len(tries) == 2
    assert (ended.status, len(good)) == ("completed", 1)


def test_a_batch_whose_workers_are_gone_can_be_cancelled(floor: Stack, tmp_path: Path) -> None:
    now, good, bad = asyncio.run(batch(floor, tmp_path, Door(Answer(503, None)), lines=3, cancel_after_s=0.5))
    assert now.status == "cancelled"  # type: ignore[attr-defined]
    assert (good, bad) == ([], [])


@pytest.mark.parametrize(("reply", "answer"), [
    (httpx.Response(200, content=b'{"a":1}'), Answer(200, {"a": 1})), (httpx.Response(200, content=b"\xff\0"), Answer(200, None)),
    (httpx.Response(200, content=b'["odd"]'), Answer(200, None)),
    (httpx.Response(503, content=b"{}"), Answer(503, {})), (httpx.ConnectError("x"), Answer(503, None)),
    (httpx.ReadError("x"), Answer(502, None)), (httpx.ReadTimeout("x"), Answer(502, None)),
    (httpx.RemoteProtocolError("x"), Answer(502, None)),
])
def test_what_comes_back(reply: httpx.Response | Exception, answer: Answer) -> None:
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def ask() -> Answer:
        door = FrontDoor("http://door", "t" * 40)
        door._http = httpx.AsyncClient(transport=httpx.MockTransport(handle), base_url="http://door", headers=door._http.headers)
        return await door("/v1/embeddings", b"{}", "owner", "batch-1-1", HOUSE)

    assert asyncio.run(ask()) == answer
    assert seen[0].headers["authorization"] == f"Bearer {'t' * 40}"
    assert (seen[0].headers["x-owngpt-owner"], seen[0].headers["x-owngpt-payer"]) == ("owner", HOUSE)


def test_what_crashes_left_on_the_volume_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once an hour; again after a minute when redis did not answer."""
    class Redis:
        away = True

        async def exists(self, key: str) -> bool:
            if self.away:
                raise RedisTimeout("slow")
            return key.endswith("kept")

    monkeypatch.setattr(tempfile, "tempdir", None)  # Files changes it

    async def live() -> None:
        redis, feed = Redis(), Feed(lambda: None, {}, lambda _: asyncio.sleep(0))  # type: ignore[arg-type,return-value]
        look_after = Tending(feed, WorkerTable(), Files(redis, tmp_path, 10, 10))  # type: ignore[arg-type]
        for name, age_s in (("file-left", 7200), ("file-kept", 7200), ("file-new", 10)):
            (tmp_path / name).write_bytes(b"x")
            os.utime(tmp_path / name, (time.time() - age_s,) * 2)
        assert await look_after.once() is False, "redis is away: nobody knows"
        feed.connected = True
        with pytest.raises(RedisTimeout):
            await look_after.once()
        assert await look_after.once() is False, "not at once"
        redis.away = False
        look_after._sweep_at -= 60
        assert await look_after.once() is True
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file-kept", "file-new"]
        assert look_after._sweep_at > time.monotonic() + 3500

    asyncio.run(live())
