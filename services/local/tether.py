"""Run a program that must not outlive its parent: `python -m services.local.tether PROGRAM ARGS...`.

Linux sends it SIGTERM when the parent dies, however the parent died (prctl(2), PR_SET_PDEATHSIG; it survives exec).
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def tether() -> None:
    """Tie this process to its parent."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call
        sys.exit(1)


if __name__ == "__main__":
    tether()
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 - the launcher's own command
