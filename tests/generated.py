"""Files that are made from code: written, or with `--check` compared."""

import sys
from pathlib import Path


def write_or_check(path: Path, text: str) -> int:
    """The exit status: 0 when it was written, or is as generated."""
    if "--check" in sys.argv:
        return int(not path.exists() or path.read_text() != text)
    path.write_text(text)
    return 0
