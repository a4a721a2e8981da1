"""Runs one step of the installation quietly: progress.py LOG LABEL PACKAGES COMMAND…

pip's lines go to LOG. On a terminal a bar shows how far it is (of so many packages) and how long it has taken;
elsewhere one line is written at the end. A command that fails shows the end of its log. Nothing but the standard
library: this runs before anything is installed.
"""

import subprocess
import sys
import threading
import time
from pathlib import Path

WIDTH = 28
TAIL_LINES = 15
FOUND = ("Collecting ", "Requirement already satisfied: ")


def share(log: Path, start: int, packages: int) -> float:
    """How much is done, 0 to 1: pip names each package once, and installs them all at the end."""
    with open(log, errors="replace") as file:
        file.seek(start)
        lines = file.read().splitlines()
    named = sum(line.startswith(FOUND) for line in lines)
    installing = any(line.startswith("Installing collected") for line in lines)
    return 0.7 * min(1.0, named / packages) + 0.25 * installing


def shown(seconds: float) -> str:
    """`m:ss`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def main(log: Path, label: str, packages: int, command: list[str]) -> int:
    """The step. Returns the command's exit status."""
    began, over, start = time.monotonic(), threading.Event(), log.stat().st_size if log.exists() else 0

    def draw() -> None:
        while not over.wait(0.2):
            filled = round(WIDTH * share(log, start, packages))
            bar = "━" * filled + "╌" * (WIDTH - filled)
            print(f"\r  {label:<32} {bar} {shown(time.monotonic() - began)}", end="", flush=True)

    with open(log, "a") as file:
        drawing = threading.Thread(target=draw, daemon=True)
        if sys.stdout.isatty():
            drawing.start()
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        over.set()
        if drawing.is_alive():
            drawing.join()
            print("\r", end="")
    took = shown(time.monotonic() - began)
    if status == 0:
        print(f"  {label:<32} {'━' * WIDTH} {took}", flush=True)
        return 0
    print(f"\nowngpt: {label} failed after {took}. The end of {log}:\n", file=sys.stderr)
    print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]), file=sys.stderr)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
    except KeyboardInterrupt:
        sys.exit(130)
