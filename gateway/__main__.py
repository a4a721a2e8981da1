"""Serve the gateway: `python -m gateway`."""

import argparse
import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.supervisors import Multiprocess

from common.settings import read_settings

BACKLOG = 4096
LEFT_S = 600.0
"""A socket that is older and was never taken over with is of a gateway that was killed in its start."""
_OURS = secrets.token_hex(4)


def main() -> None:
    """Parse the few things that belong to the process rather than to the gateway, check the settings, serve."""
    parser = argparse.ArgumentParser(prog="python -m gateway", description="Serve the OwnGPT gateway.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000)")
    parser.add_argument("--socket", type=Path, help="unix socket to listen on as well, for nginx on the same host")
    parser.add_argument("--processes", type=int, default=int(os.environ.get("GATEWAY_PROCESSES", "1")),
                        help="worker processes (default GATEWAY_PROCESSES or 1)")
    args = parser.parse_args()
    counters = None
    if args.processes > 1:
        # Each start gets a directory of its own, so that no other gateway wipes its counters.
        counters = os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="gateway-metrics-")
    from gateway.edge_http import DecisionProtocol
    from gateway.settings import Settings

    read_settings(Settings, "gateway")
    config = uvicorn.Config(
        "gateway.app:create", factory=True, host=args.host, port=args.port, workers=args.processes, loop="uvloop",
        http=DecisionProtocol, access_log=False, log_level="warning", server_header=False, date_header=False,
        proxy_headers=False, lifespan="on", timeout_keep_alive=75, backlog=BACKLOG, timeout_graceful_shutdown=120,
    )
    sockets = [config.bind_socket(), *([bind(args.socket)] if args.socket else [])]
    try:
        if args.processes > 1:
            Processes(config, sockets, args.socket).run()
        else:
            Server(config, args.socket).run(sockets=sockets)
    finally:
        if args.socket:
            waiting(args.socket).unlink(missing_ok=True)  # it never took over
        if counters is not None:
            shutil.rmtree(counters, ignore_errors=True)


class Processes(Multiprocess):
    """uvicorn's, which takes over the socket when the first of them has come up, however long that takes."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], path: Path | None) -> None:
        super().__init__(config, sockets)
        self._path = path

    def keep_subprocess_alive(self) -> None:
        super().keep_subprocess_alive()
        if self._path is not None and any(process.is_ready(timeout=1) for process in self.processes):
            take_over(self._path)
            self._path = None


class Server(uvicorn.Server):
    """uvicorn's, which sleeps until it is told to stop instead of looking ten times a second.

    Waking an idle process costs a millisecond of its core's time where the core has other work (docs/log.md).
    """

    _wake: Callable[[], object] | None = None

    def __init__(self, config: uvicorn.Config, path: Path | None = None) -> None:
        super().__init__(config)
        self._path = path

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._path is not None:
            take_over(self._path)

    async def main_loop(self) -> None:
        told = asyncio.Event()
        self._wake = partial(asyncio.get_running_loop().call_soon_threadsafe, told.set)
        if not self.should_exit:
            await told.wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._wake is not None:
            self._wake()


def bind(path: Path) -> socket.socket:
    """A unix socket that is to be at `path`; `take_over` puts it there. All who reach the folder may connect."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    partial = waiting(path)
    for left in path.parent.glob(f"{path.stem}.{'?' * len(_OURS)}"):
        with contextlib.suppress(FileNotFoundError):
            if left.stat().st_mtime < time.time() - LEFT_S:
                left.unlink()
    sock.bind(str(partial))
    partial.chmod(0o666)
    sock.listen(BACKLOG)
    return sock


def take_over(path: Path) -> None:
    """From here on who connects to `path` comes to us, whoever listened there before."""
    waiting(path).replace(path)


def waiting(path: Path) -> Path:
    """Where the socket is until we are up."""
    return path.with_suffix(f".{_OURS}")


if __name__ == "__main__":
    main()
