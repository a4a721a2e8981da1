"""Batches and the door they ask at: answers that break off, cannot be read, or never come; with a real redis, a scripted door."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common.auth import HOUSE
from common.database import Database
from common.feed import Feed
from common.workers import WorkerTable
from services.jobs.app import Tending
from services.jobs.batch import Batch
from services.jobs.batch_results import Results
from services.jobs.front_door import Answer, FrontDoor
from tests.harness import Stack, running
from tests.jobs_service import GOOD, Door, Mortal, Service, database, redis_of


@pytest.fixture(scope="module")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("door")) as stack:
        yield stack


async def batch(floor: Stack, folder: Path, door: Door, lines: int = 1, cancel_after_s: float = 0.0, kept: Database | None = None) -> tuple[Batch, list[dict], list[dict]]:
    """(the batch at its end, its results, its failures)."""
    redis, kept = redis_of(floor), kept or database(folder)
    service = Service(kept, folder, redis, door)
    made = await service.create(await service.upload(lines))
    if cancel_after_s:
        await asyncio.sleep(cancel_after_s)
        await service.batches.cancel(made.id, "owner")
    now = await service.over(made.id)
    await service.batches.close()
    await redis.aclose()
    kept.close()
    return now, service.rows(now.output_file_id), service.rows(now.error_file_id)


def test_every_line_once(floor: Stack, tmp_path: Path) -> None:
    door = Door(GOOD)
    now, good, bad = asyncio.run(batch(floor, tmp_path, door, lines=50))
    assert (now.status, now.completed, now.failed) == ("completed", 50, 0)
    assert len({row["custom_id"] for row in good}) == 50
    assert bad == []
    assert door.asked == [("owner", "")] * 50


def test_an_answer_that_cannot_be_read_fails_its_line_and_is_not_asked_again(floor: Stack, tmp_path: Path) -> None:
    """It counted as `nobody there`, and was computed again every half second for a day."""
    door = Door(Answer(200, None))
    now, _, bad = asyncio.run(batch(floor, tmp_path, door))
    assert (now.status, now.completed, now.failed) == ("completed", 0, 1)
    assert bad[0]["error"]["code"] == "unreadable_answer"
    assert len(door.asked) == 1


def test_an_answer_that_broke_off_after_it_was_recorded_is_paid_once(floor: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.jobs.batch_run.RETRY_S", 0.05)

    async def run() -> Door:
        records = redis_of(floor, "worker")
        door = Door(Answer(502, None), GOOD, redis=records)
        now, good, _ = await batch(floor, tmp_path, door)
        assert (now.status, len(good)) == ("completed", 1)
        await records.aclose()
        return door

    assert asyncio.run(run()).asked == [("owner", ""), ("owner", HOUSE)]


def test_a_disk_that_is_full_for_a_moment_loses_and_doubles_no_line(floor: Stack, tmp_path: Path) -> None:
    class FullAtFirst(Door):
        async def __call__(self, *asked: str) -> Answer:
            kept.full = 3 * (len(self.asked) == 0)
            return await super().__call__(*asked)

    kept, door = database(tmp_path, Mortal), FullAtFirst(GOOD)
    ended, good, bad = asyncio.run(batch(floor, tmp_path, door, lines=12, kept=kept))
    assert kept.full == 0
    assert (ended.status, ended.completed, bad) == ("completed", 12, [])
    assert sorted(row["custom_id"] for row in good) == sorted(f"c{i}" for i in range(12))
    assert len(door.asked) == 12


def test_a_bug_while_a_batch_runs_forgets_no_batch(floor: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyError of ours is no sign that there is no such batch."""
    lines, tries = Results.lines, []

    def fails_at_first(results: Results) -> set[int]:
        tries.append(results)
        if len(tries) == 1:
            raise KeyError("r")
        return lines(results)

    monkeypatch.setattr(Results, "lines", fails_at_first)
    monkeypatch.setattr("services.jobs.batches.AGAIN_S", 0.05)
    ended, good, _ = asyncio.run(batch(floor, tmp_path, Door(GOOD)))
    assert len(tries) == 2
    assert (ended.status, len(good)) == ("completed", 1)


def test_a_line_that_kills_workers_is_asked_once_more_and_alone(floor: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried again and again it killed a third worker; and lines that were only there when it did failed with it."""
    monkeypatch.setattr("services.jobs.batch_run.HELD_S", 0.3)
    held, poison, deaths, together = Answer(502, {"error": {"code": "request_held_back"}}), "-3", [], [0]

    class Deadly(Door):
        open = 0

        async def __call__(self, endpoint: str, body: bytes, owner: str, request_id: str, payer: str = "") -> Answer:
            self.open += 1
            await asyncio.sleep(0.02)
            innocent = not request_id.endswith(poison)
            if not innocent:
                deaths.append(self.open)
            self.script = [GOOD if innocent and (len(deaths) != 1 or together[0] > 2) else held]
            together[0] += innocent and self.script == [held]
            answer = await super().__call__(endpoint, body, owner, request_id, payer)
            self.open -= 1
            return answer

    now, _, bad = asyncio.run(batch(floor, tmp_path, Deadly(GOOD), lines=12))
    assert (now.status, now.completed, now.failed) == ("completed", 11, 1)
    assert bad[0]["custom_id"] == "c2"
    assert deaths[1:] == [1], "once more, and nothing else was on its way"


def test_a_batch_whose_workers_are_gone_can_be_cancelled(floor: Stack, tmp_path: Path) -> None:
    now, good, bad = asyncio.run(batch(floor, tmp_path, Door(Answer(503, None)), lines=3, cancel_after_s=0.5))
    assert now.status == "cancelled"
    assert (good, bad) == ([], [])


def test_with_one_worker_a_deadly_line_kills_it_twice_and_no_more(floor: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the worker was starting again the line was asked as if it were new: a death a minute, for a day."""
    monkeypatch.setattr("services.jobs.batch_run.HELD_S", 0.1)
    monkeypatch.setattr("services.jobs.batch_run.RETRY_S", 0.02)
    died, gone = Answer(502, {"error": {"code": "upstream_error"}}), Answer(503, {"error": {"code": "no_worker_ready"}})
    door = Door(died, gone, gone, died, gone, gone, GOOD)
    now, _, bad = asyncio.run(batch(floor, tmp_path, door))
    assert (now.status, now.failed, len(bad)) == ("completed", 1, 1)
    assert len(door.asked) == 4


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


def test_what_crashes_left_on_the_volume_is_swept(tmp_path: Path) -> None:
    """Once an hour; again after a minute when the database did not answer."""
    async def live() -> None:
        kept = database(tmp_path, Mortal)
        service = Service(kept, tmp_path / "files", redis=None, door=Door(GOOD))  # type: ignore[arg-type]
        look_after = Tending(Feed(lambda: None, {}, lambda _: asyncio.sleep(0)), WorkerTable(), service.files, kept)  # type: ignore[arg-type,return-value]
        assert await look_after.once() is False, "whoever waits to register a file comes first"
        look_after._sweep_at -= 3600
        known = await service.upload(1)
        for name, age_s in ((known, 7200), ("file-left", 7200), ("file-new", 10)):
            (service.files.folder / name).touch()
            os.utime(service.files.folder / name, (time.time() - age_s,) * 2)
        kept.full = 1
        with pytest.raises(OSError, match="full"):
            await look_after.once()
        assert await look_after.once() is False, "not at once"
        look_after._sweep_at -= 60
        assert await look_after.once() is True
        assert sorted(path.name for path in service.files.folder.iterdir()) == sorted([known, "file-new"])
        assert look_after._sweep_at > time.monotonic() + 3500

    asyncio.run(live())
