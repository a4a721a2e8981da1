"""Batches and fine-tuning jobs as state machines: whatever happens, in any order, and killed at any transaction.

Real SQLite, a real redis for the usage stream; the gateway's door and the trainer are scripted. `make test` tries some
hundred steps, `make bench-faults` twenty thousand.
"""

import asyncio
import collections
import contextlib
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sqlalchemy import select, update

from common import errors
from common.redis.names import USAGE
from common.tasks import end_tasks
from common.tuning import FINISHED, End, Report, event
from services.jobs import batch_run, batches, checks, leases, tables, trainers
from services.jobs.batch import UNFINISHED
from services.jobs.batch_run import MAX_ATTEMPTS
from services.jobs.checks import Checks
from services.jobs.front_door import Answer
from services.jobs.leases import LEASE_S
from services.jobs.trainers import Trainers
from services.jobs.tuning import CreateJob, Tuning
from tests.harness import Stack
from tests.jobs_service import GOOD, Dead, Door, Mortal, Service, database, incoming, redis_of

PICK = st.integers(0, 9)


def pick(things: Iterable[str], n: int) -> str:
    """One of them; which, does not change what hypothesis draws next: that must not depend on time."""
    found = list(things)
    return found[n % len(found)]


STEPS: collections.Counter[str] = collections.Counter()
"""How often each rule was tried."""


class Clock:
    """The leases' time. Everything else lives in real time."""

    def __init__(self) -> None:
        self.now = 1e9

    def time(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


class Life(RuleBasedStateMachine):
    """What both machines need: a loop, a folder in memory, a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda *_: None)  # processes die here
        self.folder = Path(tempfile.mkdtemp(prefix="life-", dir="/dev/shm"))
        database(self.folder).close()
        self.clock, self.patch = Clock(), pytest.MonkeyPatch()
        for module in (leases, trainers):
            self.patch.setattr(module, "time", self.clock)

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        STEPS[type(self).__name__] += 1
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.patch.undo()
        self.loop.close()
        shutil.rmtree(self.folder)


class MoodyDoor(Door):
    """good: answers; bad: refuses; none: nobody there; broken: computed, then the connection breaks."""

    mood = "good"
    alive: Callable[[], bool] = staticmethod(lambda: True)

    async def __call__(self, *asked: str) -> Answer:
        if not self.alive():
            raise Dead
        await asyncio.sleep(0.003)  # a batch lasts for some steps
        self.script = [{"good": GOOD, "bad": Answer(400, {"error": {}}), "none": Answer(503, None), "broken": Answer(502, None)}[self.mood]]
        return await super().__call__(*asked)


class BatchLife(Life):
    floor: ClassVar[Stack]

    def __init__(self) -> None:
        super().__init__()
        self.kills = 0
        for module, name in ((batch_run, "RETRY_S"), (batch_run, "WRITE_EVERY_S"), (batch_run, "POLL_S"), (batches, "AGAIN_S")):
            self.patch.setattr(module, name, 0.002)
        self.redis, self.recorder = redis_of(self.floor), redis_of(self.floor, "worker")
        self.services: list[Service] = []
        self.doors: list[MoodyDoor] = []
        self.froze = False
        """Two have worked on one batch for a moment: what was on its way then may be paid twice, and counts once."""
        self.files: dict[str, int] = {}
        self.batches: dict[str, int] = {}
        self.floor.redis("worker").delete(USAGE)

    @initialize()
    def start(self) -> None:
        """One more process of the jobs service."""
        kept = database(self.folder, Mortal)
        assert isinstance(kept, Mortal)
        door = MoodyDoor(redis=self.recorder)
        door.alive = lambda: not kept.dead  # type: ignore[method-assign]
        self.doors.append(door)
        self.services.append(Service(kept, self.folder / "files", self.redis, door))
        self.wait()

    @property
    def service(self) -> Service:
        return self.services[0]

    @rule(lines=st.integers(1, 30))
    def upload(self, lines: int) -> None:
        if len(self.files) < 5:
            self.files[self.do(self.service.upload(lines))] = lines

    @rule(n=PICK)
    def create(self, n: int) -> None:
        if self.files and len(self.batches) < 8:
            file = pick(self.files, n)
            self.batches[self.do(self.service.create(file)).id] = self.files[file]
            self.wait()

    @rule(n=PICK)
    def cancel(self, n: int) -> None:
        if not self.batches:
            return
        batch = pick(self.batches, n)
        try:
            assert self.do(self.services[-1].batches.cancel(batch, "owner")).status in ("cancelling", "cancelled")
        except errors.InvalidRequest:
            assert self.status(batch) not in ("validating", "in_progress")

    @rule(n=PICK)
    def delete_file(self, n: int) -> None:
        if not self.files:
            return
        file = pick(self.files, n)
        try:
            self.do(self.service.files.delete(file, "owner"))
            del self.files[file]
        except errors.Conflict as error:  # it may be over by now: its last transaction waits for no loop
            assert any(batch in error.message for batch in self.batches)

    @rule(mood=st.sampled_from(["good", "good", "bad", "none", "broken"]))
    def workers(self, mood: str) -> None:
        for door in self.doors:
            door.mood = mood
        self.wait()

    @rule(times=st.integers(1, 6))
    def disk_full(self, times: int) -> None:
        self.service.database.full = times  # type: ignore[attr-defined]
        self.wait()
        self.service.database.full = 0  # type: ignore[attr-defined]

    @precondition(lambda self: self.kills < MAX_ATTEMPTS - 1)  # a batch whose service dies more often is given up
    @rule(fuse=st.integers(0, 8), after=st.booleans())
    def kill(self, fuse: int, after: bool) -> None:
        """-9, at the transaction after so many; then somebody starts it again."""
        self.kills += 1
        dying = self.services.pop(0)
        dying.database.fuse, dying.database.after = fuse, after  # type: ignore[attr-defined]
        for _ in range(10):
            if dying.database.dead:  # type: ignore[attr-defined]
                break
            self.loop.run_until_complete(self.look(dying))
        dying.database.dead = True  # type: ignore[attr-defined]
        self.loop.run_until_complete(end_tasks(dying.batches._tasks.values()))
        dying.database.close()
        self.clock.now += LEASE_S + 1
        for other in self.services:  # they have renewed theirs meanwhile
            self.loop.run_until_complete(other.leases.renew())
        if not self.services:
            self.start()

    @rule()
    def stop(self) -> None:
        """As SIGTERM does."""
        self.do(self.service.batches.close())
        self.services.pop(0).database.close()
        if not self.services:
            self.start()

    @rule()
    def second_process(self) -> None:
        if len(self.services) < 2:
            self.start()

    @rule()
    def freeze(self) -> None:
        """A process that is stopped for longer than its leases, and then goes on as if nothing had been."""
        if len(self.services) == 2:
            self.clock.now += LEASE_S + 1
            self.froze = True
            for _ in range(3):
                self.do(self.look(self.services[1]))
            self.wait()

    @rule(n=PICK)
    def its_day_is_over(self, n: int) -> None:
        if not self.batches:
            return
        batch = pick(self.batches, n)
        table = tables.batches
        self.service.database.transact(lambda c: c.execute(update(table).where(table.c.id == batch).values(expires_at=1)))
        for service in self.services:
            if run := service.batches._runs.get(batch):
                run._batch.expires_at = 1

    @rule()
    def wait(self) -> None:
        for service in self.services:
            self.do(self.look(service))

    async def look(self, service: Service) -> None:
        """A second of a process' life."""
        with contextlib.suppress(OSError, Dead):
            await service.batches.look()
        await asyncio.sleep(0.004)

    def status(self, batch: str) -> str:
        query = select(tables.batches.c.status).where(tables.batches.c.id == batch)
        return self.service.database.transact(lambda c: str(c.execute(query).scalar_one()))

    def teardown(self) -> None:
        try:
            self.check()
        finally:
            for service in self.services:
                self.loop.run_until_complete(service.batches.close())
                service.database.close()
            self.loop.run_until_complete(self.redis.aclose())
            self.loop.run_until_complete(self.recorder.aclose())
            super().teardown()

    def check(self) -> None:
        """Every batch ends; each line once; completed + failed = total; nothing is billed twice."""
        self.workers("good")
        self.clock.now += LEASE_S + 1
        for _ in range(2000):
            self.wait()
            if not set(map(self.status, self.batches)) & set(UNFINISHED):
                break
        for batch_id, lines in self.batches.items():
            batch = self.loop.run_until_complete(self.service.batches.get(batch_id, "owner"))
            assert batch.status not in UNFINISHED, batch
            good, bad = self.service.rows(batch.output_file_id), self.service.rows(batch.error_file_id)
            assert (len(good), len(bad)) == (batch.completed, batch.failed), batch
            names = [row["custom_id"] for row in [*good, *bad]]
            assert len(set(names)) == len(names), batch
            if batch.status in ("completed", "expired") and batch.total:
                assert set(names) == {f"c{i}" for i in range(lines)}, batch
            assert batch.status != "failed", batch.errors
        assert self.service.database.transact(lambda c: tables.count(c, tables.batch_results)) == 0
        billed = collections.Counter(name for door in self.doors for name in door.billed)
        assert self.froze or not {name: count for name, count in billed.items() if count > 1}


class JobLife(Life):
    """Jobs, their checks, and two trainers."""

    def __init__(self) -> None:
        super().__init__()
        self.good = True
        self.patch.setattr(checks, "run_check", self.run_check)
        self.database = database(self.folder, Mortal)
        self.files = Service(self.database, self.folder / "files", None, Door(GOOD)).files  # type: ignore[arg-type]
        self.tuning = Tuning(self.database, None, lambda: frozenset({"m"}), 16)  # type: ignore[arg-type]
        self.trainers, self.checks = Trainers(self.database), Checks(self.database, self.files)
        self.held: dict[str, tuple[str, str]] = {}
        """Trainer -> (job, token), as it believes."""
        self.numbers = {"A": 0, "B": 0}
        self.wishes: dict[str, str] = {}
        """What was accepted, and has not happened yet."""
        self.jobs: list[str] = []
        self.said: list[str] = []

    async def run_check(self, paths: list[Path]) -> dict[str, Any]:
        await asyncio.sleep(0)
        return checks.failed("bad", "It is bad.") if not self.good else {"problems": [], "warnings": []}

    @initialize()
    def upload(self) -> None:
        self.file = self.do(self.files.add(incoming(self.files, b"{}\n"), "t.jsonl", "fine-tune", "owner")).id

    @rule(good=st.booleans())
    def create(self, good: bool) -> None:
        self.good = good
        try:
            self.jobs.append(self.do(self.tuning.create(CreateJob(model="m", training_file=self.file), "owner")).id)
        except errors.InvalidRequest as error:
            assert error.code == "too_many_jobs"

    @rule()
    def look(self) -> None:
        async def some() -> None:
            await self.checks.look()
            await asyncio.sleep(0.002)

        self.do(some())

    @rule()
    def the_jobs_service_dies(self) -> None:
        self.loop.run_until_complete(end_tasks(self.checks._tasks.values()))
        self.checks = Checks(self.database, self.files)
        self.clock.now += LEASE_S + 1

    @rule(n=PICK, verb=st.sampled_from(["cancel", "pause", "resume"]))
    def change(self, n: int, verb: str) -> None:
        if not self.jobs:
            return
        job = self.do(self.tuning.get(pick(self.jobs, n), "owner"))
        try:
            now = self.do(getattr(self.tuning, verb)(job))
        except errors.InvalidRequest as error:
            assert error.code == "wrong_state"
            return
        if now.status == "running" and verb != "resume":
            self.wishes[job.id] = verb
        if verb == "cancel":
            assert now.status in ("cancelled", "running")

    @rule(who=st.sampled_from("AB"))
    def claim(self, who: str) -> None:
        leased = self.do(self.trainers.lease("m"))
        if leased is not None:
            self.held[who] = (leased.job.id, leased.token)
            self.numbers[who] = 0

    @rule(who=st.sampled_from("AB"), twice=st.booleans())
    def report(self, who: str, twice: bool) -> None:
        if who not in self.held:
            return
        job, token = self.held[who]
        self.numbers[who] += 1
        told = event("something")
        for _ in range(1 + twice):
            try:
                wish = self.do(self.trainers.report(job, Report(token, self.numbers[who], [told]))).wish
                assert wish == self.wishes.get(job, wish)
                if told["id"] not in self.said:
                    self.said.append(told["id"])
            except errors.Conflict:
                self.held.pop(who, None)

    @rule(who=st.sampled_from("AB"), status=st.sampled_from(["succeeded", "failed", "paused", "running", "obey"]), twice=st.booleans())
    def end(self, who: str, status: str, twice: bool) -> None:
        if who not in self.held:
            return
        job, token = self.held[who]
        if status == "obey":
            status = {"cancel": "cancelled", "pause": "paused"}.get(self.wishes.get(job, ""), "failed")
        error = {"message": "x", "code": "y", "param": None} if status == "failed" else None
        for _ in range(1 + (twice and status != "running")):
            try:
                wish = self.do(self.trainers.end(job, End(token, status, error))).wish  # type: ignore[arg-type]
            except errors.Conflict:
                self.held.pop(who, None)
                return
            if wish:
                assert (status, wish) == ("succeeded", self.wishes[job])
                return
        assert not (status == "succeeded" and job in self.wishes), "an accepted wish was ignored"
        if status != "running" and self.wishes.pop(job, None) == "cancel":
            now = self.do(self.tuning.get(job, "owner")).status
            assert now in ("cancelled", "failed"), "an accepted cancel was lost"
        self.held.pop(who, None)

    @rule()
    def trainers_are_silent(self) -> None:
        self.clock.now += trainers.LEASE_S + 1

    def teardown(self) -> None:
        try:
            for _ in range(200):
                self.look()
                for job_id in self.jobs:
                    job = self.loop.run_until_complete(self.tuning.get(job_id, "owner"))
                    if job.status == "paused":
                        self.loop.run_until_complete(self.tuning.resume(job))
                self.clock.now += trainers.LEASE_S + 1
                if (leased := self.do(self.trainers.lease("m"))) is not None:
                    status = {"cancel": "cancelled", "pause": "paused"}.get(leased.job.wish, "succeeded")
                    self.do(self.trainers.end(leased.job.id, End(leased.token, status)))  # type: ignore[arg-type]
                jobs = [self.loop.run_until_complete(self.tuning.get(i, "owner")) for i in self.jobs]
                if all(job.status in FINISHED for job in jobs):
                    break
            assert all(job.status in FINISHED for job in jobs) if self.jobs else True
            told = [e["id"] for job in jobs for e in self.loop.run_until_complete(self.tuning.events(job))] if self.jobs else []
            assert len(told) == len(set(told)), "an event twice"
            assert set(self.said) <= set(told), "an event that was taken is not there"
            self.loop.run_until_complete(self.files.delete(self.file, "owner"))
        finally:
            self.loop.run_until_complete(self.checks.close())
            self.database.close()
            super().teardown()


def profile(examples: int, steps: int) -> settings:
    """So much of it."""
    return settings(max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=False,
                    suppress_health_check=list(HealthCheck), print_blob=True)
