"""`python -m monitoring`: write the dashboards and the SLO rules. `--check`: say what would change, and exit with 1."""

import argparse
import sys
from pathlib import Path

import yaml

from monitoring import slo
from monitoring.boards import BOARDS
from monitoring.panels import render

HERE = Path(__file__).parent
HEADER = "# Written by `python -m monitoring` from monitoring/slo.py; do not edit.\n"


def generated() -> dict[Path, str]:
    """Every generated file and what it must contain."""
    files = {HERE / "prometheus/rules/slo.yml": HEADER + yaml.safe_dump(slo.rules(), sort_keys=False, width=118)}
    return files | {HERE / f"grafana/dashboards/{board.uid}.json": render(board) for board in BOARDS}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m monitoring", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when a file is not as generated")
    check = parser.parse_args().check
    files = generated()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{'not as generated' if check else 'written'}: {path.relative_to(HERE.parent)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
