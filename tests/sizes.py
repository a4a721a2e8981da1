"""Files over 300 lines and functions over 50 in the programs: each with a reason, printed by `make check`."""

import ast
import sys
from collections.abc import Iterator

from services.local.plan import ROOT

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50
FOLDERS = ("common", "gateway", "services")
REASONS = {
    "common/dataset.py:_example": "the rules of one training row, top to bottom; each is two lines",
    "services/jobs/migrations/versions/r0001_first.py:upgrade": "a table of columns",
    "services/trainer/loop.py:train": "half of it is the table of TrainingArguments",
    "services/trainer/run.py:prepare": "one pass over both files, and a line to the owner for everything odd in them",
    "services/worker/vllm/kv/tier.py": "one class of vLLM's, SecondaryTier: its methods share every field",
}


def found() -> Iterator[tuple[str, int]]:
    """(path, lines) of files, (path:function, lines) of functions, over their bounds."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            name = str(path.relative_to(ROOT))
            if (count := len(text.splitlines())) > MAX_FILE_LINES:
                yield name, count
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    count = (node.end_lineno or node.lineno) - node.lineno + 1
                    if count > MAX_FUNCTION_LINES:
                        yield f"{name}:{node.name}", count


def main() -> int:
    """0 when each has a reason, and each reason something to explain."""
    large = dict(found())
    for name, count in large.items():
        print(f"  {name}: {count} lines; {REASONS.get(name, 'NO REASON GIVEN')}")
    idle = REASONS.keys() - large.keys()
    for name in sorted(idle):
        print(f"  {name} is no longer too large; its reason can go")
    return int(bool(idle) or any(name not in REASONS for name in large))


if __name__ == "__main__":
    sys.exit(main())
