"""What a container's health check asks: `python -m services.worker.health`.

A start is waited for, however long it takes. One that failed is unhealthy at once, so that `docker compose up --wait`
ends: the worker stays for a while before it ends and is started anew, and its log says why.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

LATE_S = 10.0
LOOK_EVERY_S = 0.5
STAY_S = 30.0
"""Longer than Docker takes to call a container unhealthy (three checks, five seconds apart)."""


def stay(alive: Path) -> None:
    """Say that the start failed, and stay until that was seen."""
    with contextlib.suppress(OSError):  # a full disk: seen late
        _failed(alive).touch()
    time.sleep(STAY_S)


def check(alive: Path) -> int:
    """0: well. 1: not, or the start failed. Waits for a start that goes on."""
    while not alive.exists():
        if _failed(alive).exists():
            print("the engine did not start; the container's log says why")
            return 1
        time.sleep(LOOK_EVERY_S)
    return int(time.time() - alive.stat().st_mtime > LATE_S)


def _failed(alive: Path) -> Path:
    return alive.with_name("failed")


if __name__ == "__main__":
    sys.exit(check(Path(os.environ["ALIVE_FILE"])))
