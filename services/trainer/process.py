"""The process of one run, seen from the trainer: started, listened to, paused, stopped, killed."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any

from common.tie import tie_to_parent
from services.trainer.plan import Folder

STOP_PATIENCE_S = 8.0


class Run:
    """The process of one run and what it says."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.result: dict[str, float] | None = None
        self.rejected: dict[str, Any] | None = None
        self.status: int | None = None
        self._said: queue.Queue[Any] = queue.Queue()

    def __enter__(self) -> "Run":
        with open(self._folder.log, "ab") as log:
            self._process = subprocess.Popen(
                ["nice", "-n", "10", sys.executable, "-m", "services.trainer.run", str(self._folder.root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                preexec_fn=_killed_with_parent,
                env=os.environ | {"OMP_NUM_THREADS": str(threads())} | one_gpu(),
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.status = self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._reader.join()

    def next(self, timeout_s: float) -> Any:
        """What the run says next; None when it says nothing for a while, `...` at its end."""
        with contextlib.suppress(queue.Empty):
            said = self._said.get(timeout=timeout_s)
            if said is ...:
                self.status = self._process.wait()
            elif said["kind"] == "done":
                self.result = {k: v for k, v in said.items() if k != "kind"}
                return None
            elif said["kind"] == "rejected":
                self.rejected = said
                return None
            return said
        return None

    def go(self) -> None:
        """It waits, ready, and may train."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        with contextlib.suppress(BrokenPipeError):  # it has ended meanwhile, and says how
            self._process.stdin.write(b"go\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        """End it now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Let it write a checkpoint, if it can in time."""
        self._folder.pause.touch()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_PATIENCE_S)

    def explain(self) -> str:
        """Why it ended, for its owner."""
        if self.status == -signal.SIGKILL:
            return (
                "The training process was killed, most likely for want of memory. A smaller batch_size, shorter rows "
                "(TRAIN_MAX_TOKENS) or more memory for the trainer will help."
            )
        last = self._folder.log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"The training process ended with status {self.status}: {last[0][:500] if last else 'it said nothing'}"

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - a pipe
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self._said.put(json.loads(line))
        self._said.put(...)


def threads() -> int:
    """How many cores a run may use: half of them.

    A run gives way to everything else (nice). Its threads wait for each other hundreds of times a step, so with as many
    threads as cores beside busy workers a step takes twenty seconds instead of half a one (docs/log.md).
    """
    return max(1, len(os.sched_getaffinity(0)) // 2)


def one_gpu() -> dict[str, str]:
    """The environment of a run: of several GPUs the first, for with two transformers would split every batch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[0]}


def _killed_with_parent() -> None:
    """In the child, before exec: killed when the trainer is gone, so that it holds no GPU that others believe free."""
    tie_to_parent(signal.SIGKILL)
