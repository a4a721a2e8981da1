"""Run a program that must not outlive its parent, and as root has root's files alone, not root's rights:

    python -m services.local.tether [--privileged] PROGRAM ARGS...

Linux sends it SIGTERM when the parent dies, however it died (prctl(2), PR_SET_PDEATHSIG; it survives exec). Rented pods
are containers in which everything is root: such a program loses every capability for good (capabilities(7)) and
gains nothing by set-user-ID files, unless it is --privileged: nginx, whose workers then are nobody.
"""

import ctypes
import os
import sys

from common.tie import tie_to_parent

PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
MOST_CAPABILITIES = 64


def tether() -> None:
    """Tie this process to its parent."""
    parent = os.getppid()
    tie_to_parent()
    if os.getppid() != parent:  # it died before the call
        sys.exit(1)


def drop_rights() -> None:
    """No program that this process becomes has a capability. Without the right to drop them there is none to drop."""
    libc = ctypes.CDLL(None)
    for capability in range(MOST_CAPABILITIES):  # the kernel refuses those that it does not know
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


if __name__ == "__main__":
    tether()
    program = sys.argv[1:]
    if program[0] == "--privileged":
        program = program[1:]
    else:
        drop_rights()
    os.execvp(program[0], program)  # noqa: S606 - the launcher's own command
