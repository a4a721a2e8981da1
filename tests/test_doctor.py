"""`make doctor` on state folders that something is wrong with; on a running stack it is asked in `test_embedded.py`."""

import os
import socket
import time
from pathlib import Path

import pytest

from common.files import new_id
from common.tuning import Job
from services.jobs import tables
from services.local import doctor
from services.local.plan import Dials
from tests.harness import free_ports
from tests.jobs_service import database


@pytest.fixture
def dials(tmp_path: Path) -> Dials:
    return Dials(tmp_path, port=free_ports(1)[0])


def wrong(dials: Dials) -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.examine(dials) if finding.do}


def test_nothing_is_wrong_where_nothing_is(dials: Dials) -> None:
    assert set(wrong(dials)) <= {"disk", "memory"}, "of this machine"


def test_what_waits_for_nobody_is_named(dials: Dials) -> None:
    kept = database(dials.state)
    old = int(time.time()) - 3600
    jobs = {status: Job(id=new_id("ftjob"), owner="o", status=status, created_at=old, model="m", training_file="f", seed=1, hyperparameters={})  # type: ignore[arg-type]
            for status in ("queued", "running", "succeeded", "paused")}
    for job in jobs.values():
        kept.transact(lambda c, job=job: tables.add(c, tables.jobs, job, queued_at=old))
    assert jobs["running"].id in wrong(dials)["jobs"].said
    assert jobs["queued"].id not in wrong(dials)["jobs"].said, "it waits for the one before it"
    kept.transact(lambda c: tables.move(c, tables.jobs, jobs["running"].id, ("running",), leased_until=time.time() + 10))
    assert "jobs" not in wrong(dials)
    kept.transact(lambda c: tables.move(c, tables.jobs, jobs["running"].id, ("running",), status="failed"))
    assert jobs["queued"].id in wrong(dials)["jobs"].said
    kept.close()


def test_a_damaged_database_is_named(dials: Dials) -> None:
    kept = database(dials.state)
    kept.close()
    path = dials.state / "jobs.db"
    path.write_bytes(b"x" * path.stat().st_size)
    assert "docs/backup.md" in wrong(dials)["jobs"].do


def test_a_port_of_another_program_and_a_clock_that_went_back(dials: Dials) -> None:
    with socket.create_server(("127.0.0.1", dials.port)):
        assert f"PORT={dials.port + 100}" in wrong(dials)["port"].do
    (dials.state / "logs").mkdir()
    os.utime(dials.state / "logs", (time.time() + 3600,) * 2)
    assert "behind" in wrong(dials)["clock"].do
