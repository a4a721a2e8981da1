"""The engine's process: it cannot outlive the agent, is watched, and stops with everything it has started."""

import asyncio
import contextlib
import os
import signal

from common.tie import tie_to_parent

PATIENCE_S = ((signal.SIGTERM, 8.0), (signal.SIGKILL, 5.0))


class Process:
    """One child, in a process group of its own."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._command, self._environment = command, environment
        self._child: asyncio.subprocess.Process | None = None

    @property
    def runs(self) -> bool:
        """Whether it was started and has not ended."""
        return self._child is not None and self._child.returncode is None

    @property
    def pid(self) -> int:
        """Its process id; 0 before it is started."""
        return self._child.pid if self._child is not None else 0

    async def start(self) -> int:
        """Start it; its process id."""
        # No session of its own: that would be a scheduling group (autogroup), and an engine that starts beside a busy
        # one then gets a hundredth of a core for minutes (docs/log.md).
        self._child = await asyncio.create_subprocess_exec(
            *self._command, env=self._environment, process_group=0, preexec_fn=tie_to_parent
        )
        return self._child.pid

    async def wait(self) -> int:
        """Until it ends by itself; its exit status. For ever before it is started."""
        if self._child is None:
            await asyncio.get_running_loop().create_future()
        assert self._child is not None  # noqa: S101 - else one waits for ever above
        return await self._child.wait()

    async def stop(self) -> None:
        """End it, politely first, and then whatever it left behind."""
        child = self._child
        if child is None:
            return
        for number, patience_s in PATIENCE_S:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.wait(), patience_s)
                break
        with contextlib.suppress(ProcessLookupError):  # its own children, should any be left
            os.killpg(child.pid, signal.SIGKILL)
        self._child = None
