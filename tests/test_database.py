"""The jobs service's database: SQLite and a real Postgres, its migrations, and the state that older releases left in redis."""

import asyncio
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from redis import Redis
from sqlalchemy import text

from common import errors
from common.database import Database, DatabaseAway
from common.files import new_id
from common.tuning import FINISHED, MAX_EVENTS, End, Job, Report, event
from services.jobs import checks, legacy, tables
from services.jobs.app import MIGRATIONS
from services.jobs.batch import Batch
from services.jobs.front_door import Answer
from services.jobs.trainers import Trainers
from services.jobs.tuning import CreateJob, Tuning
from tests.harness import Cache, Stack, running
from tests.jobs_service import CHAT, GOOD, Door, Service, database, find_postgres, incoming, postgres, redis_of


@pytest.fixture(scope="module")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("database")) as stack:
        yield stack


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    if find_postgres() is None:
        pytest.skip("no Postgres here (on Debian: apt install postgresql)")
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database of either kind."""
    url = "" if request.param == "sqlite" else request.getfixturevalue("server")
    made = database(tmp_path, url=url)
    if url:
        made.transact(lambda c: [c.execute(table.delete()) for table in reversed(tables.metadata.sorted_tables)])
    yield made
    made.close()


def a_job(**fields: object) -> Job:
    return Job(**{"id": new_id("ftjob"), "owner": "owner", "status": "queued", "created_at": 1, "model": "m", "training_file": "f",
                  "seed": 1, "hyperparameters": {}, **fields})  # type: ignore[arg-type]


def test_the_migrations_make_the_tables_of_the_code(kept: Database) -> None:
    assert kept.transact(lambda c: compare_metadata(MigrationContext.configure(c), tables.metadata)) == []
    kept.migrate()  # again: nothing to do


def _migrate(url: str) -> None:
    Database(url, MIGRATIONS).migrate()


def test_processes_that_start_together_make_them_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new.db"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(_migrate, [url] * 3)
    made = Database(url, MIGRATIONS)
    assert made.transact(lambda c: tables.count(c, tables.jobs)) == 0
    made.close()


def test_what_is_committed_is_on_the_disk(tmp_path: Path) -> None:
    made = database(tmp_path)
    assert made.transact(lambda c: [c.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous", "foreign_keys")]) == ["wal", 2, 1]
    made.close()


def test_a_full_disk_changes_nothing_and_says_so(tmp_path: Path) -> None:
    made = database(tmp_path)
    with pytest.raises(DatabaseAway, match="full"):
        made.transact(lambda c: (c.execute(text("PRAGMA max_page_count=40")), tables.add(c, tables.jobs, a_job(model="x" * 500_000))))
    assert made.transact(lambda c: tables.count(c, tables.jobs)) == 0
    made.close()


def test_a_server_that_is_gone_is_away(server: str) -> None:
    gone = Database(server.replace("@127.0.0.1:", "@127.0.0.1:1"), MIGRATIONS) if False else Database("postgresql+psycopg://x@127.0.0.1:9/x", MIGRATIONS)
    with pytest.raises(DatabaseAway):
        gone.migrate()


def test_a_batch(kept: Database, floor: Stack, tmp_path: Path) -> None:
    async def live() -> None:
        redis = redis_of(floor)
        service = Service(kept, tmp_path / "files", redis, Door(GOOD, Answer(400, {"error": {}}), GOOD))
        made = await service.create(await service.upload(40))
        now = await service.over(made.id)
        assert (now.status, now.completed, now.failed, now.total) == ("completed", 39, 1, 40)
        assert len(service.rows(now.output_file_id)) == 39
        assert [file.purpose for file in await service.files.owned("owner")].count("batch_output") == 2
        assert kept.transact(lambda c: tables.count(c, tables.batch_results)) == 0
        await service.batches.close()
        await redis.aclose()

    asyncio.run(live())


def test_two_services_never_work_on_one_batch(kept: Database, floor: Stack, tmp_path: Path) -> None:
    """192 asks and 172 output lines for 100 (A5)."""
    async def live() -> None:
        redis = redis_of(floor)
        services = [Service(kept, tmp_path / "files", redis, Door(GOOD)) for _ in range(2)]
        made = await services[0].create(await services[0].upload(100))
        for _ in range(20):
            for service in services:
                await service.batches.look()
            await asyncio.sleep(0.01)
        now = await services[1].over(made.id)
        assert (now.status, now.completed) == ("completed", 100)
        assert [len(service.means.ask.asked) for service in services] == [100, 0]  # type: ignore[attr-defined]
        for service in services:
            await service.batches.close()
        await redis.aclose()

    asyncio.run(live())


def test_a_file_in_use_is_not_deleted(kept: Database, floor: Stack, tmp_path: Path) -> None:
    """136 billed answers were left where nobody finds them (A4)."""
    async def live() -> None:
        redis = redis_of(floor)
        service = Service(kept, tmp_path / "files", redis, Door(Answer(503, None)))
        file = await service.upload(3)
        made = await service.create(file)
        with pytest.raises(errors.Conflict, match=made.id):
            await service.files.delete(file, "owner")
        with pytest.raises(errors.NotFound):
            await service.files.delete(file, "somebody else")
        await service.batches.cancel(made.id, "owner")
        await service.over(made.id)
        await service.files.delete(file, "owner")
        with pytest.raises(errors.NotFound):
            await service.create(file)
        await service.batches.close()
        await redis.aclose()

    asyncio.run(live())


def test_bytes_of_one_key_and_free_disk_are_bounded(kept: Database, tmp_path: Path) -> None:
    async def live() -> None:
        service = Service(kept, tmp_path / "files", None, Door(GOOD))  # type: ignore[arg-type]
        first = await service.upload(10)
        size = (await service.files.get(first, "owner")).bytes
        service.files._max_stored_bytes = 2 * size
        await service.files.admit("owner", size)
        await service.upload(10)
        with pytest.raises(errors.InvalidRequest, match="MAX_STORED_BYTES_PER_KEY"):
            await service.files.admit("owner", 1)
        with pytest.raises(errors.InvalidRequest, match="MAX_STORED_BYTES_PER_KEY"):
            await service.upload(1)
        assert sum(path.stat().st_size for path in service.files.folder.iterdir()) == 2 * size, "nothing of it is kept"
        await service.files.admit("another", size)
        service.files._min_free_bytes = 1 << 60
        with pytest.raises(errors.Unavailable, match="MIN_FREE_BYTES"):
            await service.files.admit("another", 1)

    asyncio.run(live())


class TestTrainers:
    def test_a_job_is_one_trainers_until_it_is_silent(self, kept: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        """A resume, or a second trainer, claimed the running job (A6)."""
        async def live() -> None:
            trainers, job = Trainers(kept), a_job()
            kept.transact(lambda c: tables.add(c, tables.jobs, job))
            first = await trainers.lease("m")
            assert first is not None
            assert await trainers.lease("m") is None
            now = time.time()
            monkeypatch.setattr("services.jobs.trainers.time.time", lambda: now + 16)
            second = await trainers.lease("m")
            assert second is not None
            assert (second.job.id, second.token != first.token) == (job.id, True)
            with pytest.raises(errors.Conflict):
                await trainers.report(job.id, Report(first.token, 1, [event("late")]))
            with pytest.raises(errors.Conflict):
                await trainers.end(job.id, End(first.token, "succeeded"))
            await trainers.end(job.id, End(second.token, "succeeded", fine_tuned_model="ft:x"))
            await trainers.end(job.id, End(second.token, "succeeded", fine_tuned_model="ft:x"))
            found = kept.transact(lambda c: tables.find(c, tables.jobs, Job, job.id))
            assert found is not None
            assert (found.status, found.fine_tuned_model) == ("succeeded", "ft:x")

        asyncio.run(live())

    def test_it_trains_what_was_asked_for(self, kept: Database) -> None:
        """Any trainer trained its own model, whatever the job said (A13)."""
        async def live() -> None:
            kept.transact(lambda c: tables.add(c, tables.jobs, a_job(model="other")))
            assert await Trainers(kept).lease("m") is None
            assert await Trainers(kept).lease("other") is not None

        asyncio.run(live())

    def test_one_that_ends_its_trainer_again_and_again_has_failed(self, kept: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        async def live() -> None:
            job, now = a_job(), time.time()
            kept.transact(lambda c: tables.add(c, tables.jobs, job))
            for n in range(5):
                monkeypatch.setattr("services.jobs.trainers.time.time", lambda n=n: now + 20 * n)
                assert await Trainers(kept).lease("m") is not None
            monkeypatch.setattr("services.jobs.trainers.time.time", lambda: now + 200)
            assert await Trainers(kept).lease("m") is None
            found = kept.transact(lambda c: tables.find(c, tables.jobs, Job, job.id))
            assert found is not None
            assert (found.status, found.error["code"]) == ("failed", "trainer_lost")  # type: ignore[index]

        asyncio.run(live())

    def test_an_accepted_cancel_comes_before_success(self, kept: Database) -> None:
        """It was ignored once training had ended (A12)."""
        async def live() -> None:
            tuning, trainers, job = Tuning(kept, None, frozenset, 5), Trainers(kept), a_job()  # type: ignore[arg-type]
            kept.transact(lambda c: tables.add(c, tables.jobs, job))
            leased = await trainers.lease("m")
            assert leased is not None
            await tuning.cancel(job)
            assert (await trainers.end(job.id, End(leased.token, "succeeded"))).wish == "cancel"
            assert (await tuning.get(job.id, "owner")).status == "running"
            await trainers.end(job.id, End(leased.token, "cancelled"))
            assert (await tuning.get(job.id, "owner")).status == "cancelled"
            with pytest.raises(errors.Conflict):
                await trainers.end(job.id, End(leased.token, "succeeded", fine_tuned_model="ft:x"))

        asyncio.run(live())

    def test_the_last_wish_that_was_accepted_is_done(self, kept: Database) -> None:
        """A cancel after a pause was lost with the pause; a pause after a cancel took its place."""
        async def live() -> None:
            tuning, trainers = Tuning(kept, None, frozenset, 5), Trainers(kept)  # type: ignore[arg-type]
            job = a_job()
            kept.transact(lambda c: tables.add(c, tables.jobs, job))
            leased = await trainers.lease("m")
            assert leased is not None
            await tuning.pause(job)
            await tuning.cancel(job)
            with pytest.raises(errors.InvalidRequest):
                await tuning.pause(job)
            for _ in range(2):
                await trainers.end(job.id, End(leased.token, "paused"))
            assert (await tuning.get(job.id, "owner")).status == "cancelled"

        asyncio.run(live())

    def test_events_and_jobs_are_bounded(self, kept: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tables, "MAX_EVENTS", 5)
        monkeypatch.setattr(tables, "KEPT_PER_KEY", 3)

        async def live() -> None:
            job = a_job(status="running")
            kept.transact(lambda c: tables.add(c, tables.jobs, job, lease="t"))
            for n in range(4):
                await Trainers(kept).report(job.id, Report("t", n + 1, [event(f"{n}{i}") for i in range(3)]))
            tuning = Tuning(kept, None, frozenset, 5)  # type: ignore[arg-type]
            assert [e["message"] for e in await tuning.events(job)] == ["32", "31", "30", "22", "21"]
            for n in range(6):
                old = a_job(status="failed", created_at=n)
                kept.transact(lambda c, old=old: (tables.add(c, tables.jobs, old), tables.say(c, old.id, [event("x")])))
            kept.transact(lambda c: tables.forget_old(c, tables.jobs, "owner", FINISHED))
            assert [found.created_at for found in await tuning.owned("owner") if found.status == "failed"] == [5, 4, 3]
            assert kept.transact(lambda c: tables.count(c, tables.job_events)) == 5 + 3
            assert MAX_EVENTS > 5

        asyncio.run(live())

    def test_somebody_elses_file_trains_nothing(self, kept: Database, tmp_path: Path) -> None:
        async def live() -> None:
            service = Service(kept, tmp_path / "files", None, Door(GOOD))  # type: ignore[arg-type]
            file = await service.upload(1, "another")
            with pytest.raises(errors.NotFound):
                await Tuning(kept, None, lambda: frozenset({"m"}), 5).create(CreateJob(model="m", training_file=file), "owner")  # type: ignore[arg-type]

        asyncio.run(live())


def test_one_key_cannot_take_the_service_down_with_batches(kept: Database, floor: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was begun at once, with all of its lines in memory and a thread of the few."""
    monkeypatch.setattr("services.jobs.batches.RUNNING_AT_ONCE", 2)

    async def live() -> None:
        redis = redis_of(floor)
        service = Service(kept, tmp_path / "files", redis, Door(Answer(503, None)), max_waiting=5)
        file = await service.upload(2)
        made = [await service.create(file) for _ in range(5)]
        with pytest.raises(errors.InvalidRequest, match="MAX_WAITING_BATCHES"):
            await service.create(file)
        await service.batches.look()
        assert len(service.batches._tasks) == 2
        service.means.ask.script = [GOOD]  # type: ignore[attr-defined]
        for batch in made:
            for _ in range(200):
                await service.batches.look()
                if (await service.batches.get(batch.id, "owner")).status == "completed":
                    break
                await asyncio.sleep(0.02)
            else:
                raise AssertionError("never its turn")
        await service.batches.close()
        await redis.aclose()

    asyncio.run(live())


def test_a_clean_stop_is_no_failed_try(kept: Database, floor: Stack, tmp_path: Path) -> None:
    """After five restarts a batch that waited for a worker was given up."""
    async def live() -> None:
        redis = redis_of(floor)
        made = None
        for _ in range(8):
            service = Service(kept, tmp_path / "files", redis, Door(Answer(503, None)))
            made = made or await service.create(await service.upload(2))
            await service.batches.look()
            await asyncio.sleep(0.05)
            await service.batches.close()
        assert made is not None
        service = Service(kept, tmp_path / "files", redis, Door(GOOD))
        await service.batches.look()
        assert (await service.over(made.id)).status == "completed"
        await service.batches.close()
        await redis.aclose()

    asyncio.run(live())


def test_a_batch_begun_while_leases_are_renewed_goes_on(kept: Database, floor: Stack, tmp_path: Path) -> None:
    """It was taken for lost, and stood still until its lease had run out."""
    async def live() -> None:
        redis = redis_of(floor)
        service = Service(kept, tmp_path / "files", redis, Door(Answer(503, None)))
        file = await service.upload(2)
        for _ in range(15):
            looking = asyncio.create_task(service.batches.look())
            await asyncio.sleep(0)
            await service.create(file)
            await looking
        assert not any(run.lost for run in service.batches._runs.values())
        await service.batches.close()
        await redis.aclose()

    asyncio.run(live())


def test_a_batch_whose_model_is_away_takes_no_place_from_another(kept: Database, floor: Stack, tmp_path: Path) -> None:
    class HalfThere(Door):
        async def __call__(self, endpoint: str, body: bytes, *asked: str) -> Answer:
            self.script = [GOOD if b'"here"' in body else Answer(503, None)]
            return await super().__call__(endpoint, body, *asked)

    async def live() -> None:
        redis = redis_of(floor)
        service = Service(kept, tmp_path / "files", redis, HalfThere(GOOD), room=4)
        service.means.models = lambda: {"m", "here"}
        away = await service.create(await service.upload(20))
        await asyncio.sleep(0.3)
        rows = [{"custom_id": f"c{i}", "method": "POST", "url": CHAT, "body": {"model": "here"}} for i in range(20)]
        file = await service.files.add(incoming(service.files, "".join(json.dumps(r) + "\n" for r in rows).encode()), "b", "batch", "owner")
        assert (await service.over((await service.create(file.id)).id, 5)).completed == 20
        assert (await service.batches.get(away.id, "owner")).completed == 0
        assert service.means.in_flight <= 4
        await service.batches.close()
        assert service.means.in_flight == 0
        await redis.aclose()

    asyncio.run(live())


def test_checks_are_made_one_at_a_time_and_a_killed_one_again(kept: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    most, tries = [0], [0]

    async def check(paths: list[Path]) -> dict:
        running.append(1)
        most[0], tries[0] = max(most[0], len(running)), tries[0] + 1
        await asyncio.sleep(0.02)
        running.pop()
        if tries[0] == 1:
            raise checks.Killed("by signal 9")
        return {"problems": [], "warnings": []}

    async def live() -> None:
        monkeypatch.setattr(checks, "run_check", check)
        monkeypatch.setattr("services.jobs.leases.LEASE_S", 0.05)
        service = Service(kept, tmp_path / "files", None, Door(GOOD))  # type: ignore[arg-type]
        jobs = [a_job(status="validating_files") for _ in range(4)]
        for job in jobs:
            kept.transact(lambda c, job=job: tables.add(c, tables.jobs, job))
        looks = checks.Checks(kept, service.files)
        for _ in range(60):
            await looks.look()
            await asyncio.sleep(0.02)
        statuses = [kept.transact(lambda c, job=job: tables.find(c, tables.jobs, Job, job.id)).status for job in jobs]  # type: ignore[union-attr]
        assert statuses == ["queued"] * 4
        assert (most[0], tries[0]) == (1, 5)
        await looks.close()

    asyncio.run(live())


def test_room_that_nobody_uses_goes_back_to_the_disk(tmp_path: Path) -> None:
    """100 MB written and deleted stayed 100 MB."""
    made = database(tmp_path)
    jobs = [a_job(status="failed") for _ in range(20)]
    for job in jobs:
        made.transact(lambda c, job=job: (tables.add(c, tables.jobs, job), tables.say(c, job.id, [event("x" * 1_000_000)])))
    made.transact(lambda c: c.execute(tables.jobs.delete()))
    made.tidy()
    assert sum(path.stat().st_size for path in tmp_path.glob("jobs.db*")) < 1_000_000
    made.close()


def test_odd_state_of_an_older_release_stops_nobody(kept: Database, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    cache = Cache(tmp_path / "cache")
    redis = Redis.from_url(cache.url, username="admin", decode_responses=True)
    batch = Batch(id=new_id("batch"), owner="o", status="finalizing", endpoint=CHAT, input_file_id=new_id("file"),
                  completion_window="24h", created_at=1, expires_at=2, results=new_id("file"), failures=new_id("file"), total=4, completed=4)
    old = {name: getattr(batch, name) for name in Batch.__struct_fields__ if name != "ends"}
    try:
        redis.hset(f"bt:{batch.id}", mapping={k: v if k == "status" else json.dumps(v) for k, v in old.items()})
        redis.hset("ftjob:odd", mapping={"status": "queued", "id": "{"})
        redis.set("file:odd", "no JSON")
        moved = {"id": batch.results, "owner": "o", "filename": "x", "purpose": "batch_output", "bytes": 1, "created_at": 1}
        redis.set(f"file:{batch.results}", json.dumps(moved))
        (tmp_path / "batches").mkdir()

        def row(n: int) -> str:
            return json.dumps({"id": f"batch_req_{batch.id[6:]}_{n}", "custom_id": f"c{n}"}) + "\n"

        (tmp_path / batch.results).write_text(row(1) + '{"id": "torn' + "\n" + row(2) + row(2))  # killed while it showed its files
        (tmp_path / "batches" / batch.failures).write_text(row(3) + row(1))
        assert legacy.move_in(redis, kept, tmp_path) == 2
        assert sorted(redis.keys("*")) == ["file:odd", "ftjob:odd"]
    finally:
        cache.kill()
    found = kept.transact(lambda c: tables.find(c, tables.batches, Batch, batch.id))
    assert found is not None
    assert (found.status, found.completed, found.failed) == ("in_progress", 2, 1)
    assert kept.transact(lambda c: tables.count(c, tables.files)) == 0


def test_what_an_older_release_left_in_redis_moves_in(kept: Database, tmp_path: Path) -> None:
    """Its keys as it wrote them; a crash in between and a second start change nothing more."""
    (tmp_path / "cache").mkdir()
    cache = Cache(tmp_path / "cache")
    redis = Redis.from_url(cache.url, username="admin", decode_responses=True)
    file = {"id": new_id("file"), "owner": "o", "filename": "a", "purpose": "batch", "bytes": 3, "created_at": 5}
    job = a_job(owner="o", metadata={"a": "b"})
    plain = {name: getattr(job, name) for name in Job.__struct_fields__}
    batch = Batch(id=new_id("batch"), owner="o", status="in_progress", endpoint="/v1/completions", input_file_id=file["id"],
                  completion_window="24h", created_at=1, expires_at=2, results=new_id("file"), failures=new_id("file"), total=3, completed=1)
    old = {name: getattr(batch, name) for name in Batch.__struct_fields__ if name != "ends"}

    def write() -> None:
        redis.set(f"file:{file['id']}", json.dumps(file))
        redis.zadd("files:o", {file["id"]: 5})
        redis.hset(f"ftjob:{job.id}", mapping={k: v if k in ("status", "wish") else json.dumps(v) for k, v in plain.items()})
        redis.rpush(f"ftevents:{job.id}", json.dumps(event("one")), json.dumps(event("two")))
        redis.rpush(f"ftcheckpoints:{job.id}", json.dumps({"id": "c"}))
        redis.lpush("ftqueue", job.id)
        redis.hset(f"bt:{batch.id}", mapping={k: v if k == "status" else json.dumps(v) for k, v in old.items()})
        redis.sadd("btactive", batch.id)

    try:
        write()
        (tmp_path / "batches").mkdir()
        rows = [{"id": f"batch_req_{batch.id[6:]}_{n}", "custom_id": f"c{n}"} for n in (1, 3)]
        (tmp_path / "batches" / batch.results).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"id": "batch_r')
        assert legacy.move_in(redis, kept, tmp_path) == 3
        assert redis.keys("*") == []
        write()  # as if it had died before it deleted them
        legacy.move_in(redis, kept, tmp_path)
        assert redis.keys("*") == []
        assert legacy.move_in(redis, kept, tmp_path) == 0
    finally:
        cache.kill()

    async def look() -> None:
        tuning = Tuning(kept, None, frozenset, 5)  # type: ignore[arg-type]
        assert await tuning.get(job.id, "o") == job
        assert [e["message"] for e in await tuning.events(job)] == ["two", "one"]
        assert await tuning.checkpoints(job) == [{"id": "c"}]
        leased = await Trainers(kept).lease("m")
        assert leased is not None

    asyncio.run(look())
    found = kept.transact(lambda c: tables.find(c, tables.batches, Batch, batch.id))
    assert found is not None
    assert (found.completed, found.status) == (2, "in_progress")
    assert kept.transact(lambda c: tables.count(c, tables.batch_results)) == 2
    assert kept.transact(lambda c: tables.count(c, tables.files)) == 1
    assert os.getpid()
