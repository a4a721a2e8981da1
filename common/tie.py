"""Processes that cannot outlive the one that started them (Linux)."""

import ctypes
import signal

PR_SET_PDEATHSIG = 1


def tie_to_parent(by: int = signal.SIGTERM) -> None:
    """From now on this process gets a signal when its parent is gone, however it went; it survives exec (prctl(2)).

    Call it in the child: a `preexec_fn`.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)
