"""What `make backup` and `make restore` say to a mistake; a backup that comes back whole is in `test_lifecycle.py`."""

import io
import json
import os
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.harness import ROOT


def owngpt(state: Path, *arguments: str | Path, status: int = 1) -> str:
    """What a command says on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "services.local", *map(str, arguments)], cwd=ROOT, text=True, capture_output=True,
        env=os.environ | {"STATE_DIR": str(state)}, timeout=60, check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


def archive_of(path: Path, known: object) -> bytes:
    with tarfile.open(path, "w:gz") as tar:
        for name, said in (("jobs.db", os.urandom(100_000)), ("backup.json", json.dumps(known).encode())):
            entry = tarfile.TarInfo(name)
            entry.size = len(said)
            tar.addfile(entry, io.BytesIO(said))
    return path.read_bytes()


@pytest.mark.parametrize("known", [{"format": 2}, {}, []])
def test_a_wrong_archive_leaves_the_place_empty(tmp_path: Path, known: object) -> None:
    """It was unpacked first; then the place was refused as "a stack's state already"."""
    archive = tmp_path / "a.tar.gz"
    archive_of(archive, known)
    assert str(archive) in owngpt(tmp_path / "state", "restore", archive)
    assert not (tmp_path / "state/jobs.db").exists()


def test_half_an_archive_leaves_the_place_empty(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(archive_of(archive, {"format": 1})[:50_000])
    (tmp_path / "state/files").mkdir(parents=True, exist_ok=True)
    (tmp_path / "state/files/mine").write_text("not the stack's")
    assert "no archive of make backup" in owngpt(tmp_path / "state", "restore", archive)
    assert (tmp_path / "state/files/mine").read_text(), "what was there before is nobody's to delete"
    assert not (tmp_path / "state/jobs.db").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "jobs.db").touch()
    said = owngpt(state, "backup", tmp_path / "nowhere/a.tar.gz")
    assert "No such file or directory" in said
    assert "nowhere" in said
    assert not (state / "backup.partial").exists()


def test_what_is_backed_up_comes_back(tmp_path: Path) -> None:
    state, again, archive = tmp_path / "state", tmp_path / "again", tmp_path / "a.tar.gz"
    for name in ("files", "adapters/ftjob-1", "runs"):
        (state / name).mkdir(parents=True)
    (state / "files/file-1").write_text("{}")
    (state / "adapters/ftjob-1/adapter_config.json").write_text("{}")
    (state / "api_key").write_text("sk-1")
    for name in ("jobs.db", "ledger.db"):
        with sqlite3.connect(state / name) as database:
            database.execute("CREATE TABLE t AS SELECT 7 AS n")
    owngpt(state, "backup", archive, status=0)
    owngpt(again, "restore", archive, status=0)
    assert (again / "api_key").read_text() == "sk-1"
    assert (again / "files/file-1").exists()
    assert (again / "adapters/ftjob-1/adapter_config.json").exists()
    for name in ("jobs.db", "ledger.db"):
        with sqlite3.connect(again / name) as database:
            assert database.execute("SELECT n FROM t").fetchall() == [(7,)]
    assert "already" in owngpt(again, "restore", archive)


def test_a_disk_that_is_full_half_way_leaves_the_place_empty(tmp_path: Path) -> None:
    """What had been unpacked stayed, and the next try was refused for it."""
    state, archive = tmp_path / "state", tmp_path / "a.tar.gz"
    for name in ("files", "adapters", "runs"):
        (state / name).mkdir(parents=True)
    (state / "files/file-1").write_bytes(os.urandom(4_000_000))
    (state / "api_key").write_text("sk-1")
    for name in ("jobs.db", "ledger.db"):
        with sqlite3.connect(state / name) as database:
            database.execute("CREATE TABLE t AS SELECT 7 AS n")
    owngpt(state, "backup", archive, status=0)
    again = tmp_path / "again"
    again.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(again)], check=False, capture_output=True).returncode:
        pytest.skip("no small disk can be made here (mount needs root)")
    try:
        assert "No space left" in owngpt(again, "restore", archive)
        assert {path.name for path in again.iterdir()} <= {"lock", "secrets", "logs"}
    finally:
        subprocess.run(["umount", "-l", str(again)], check=True)
    owngpt(tmp_path / "third", "restore", archive, status=0)
