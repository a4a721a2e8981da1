"""`python -m bench [stack]`: run a set of figures, print its table, write bench/results/NAME.json."""

import argparse
import json
import sys
from pathlib import Path

from bench import stack

SETS = {"stack": stack.figures}


def main() -> int:
    """0 when every figure was measured, whether or not it reaches its bound."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="?", default="stack", choices=sorted(SETS))
    parser.add_argument("--only", nargs="*", help="figure groups to run (default: all); the rest keep their last value")
    args = parser.parse_args()
    path = Path(__file__).parent / "results" / f"{args.name}.json"
    path.parent.mkdir(exist_ok=True)
    results: dict[str, float] = json.loads(path.read_text()) if args.only and path.exists() else {}
    for figures in SETS[args.name](set(args.only or [])):
        results.update(figures)
        path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{'figure':<28}{'measured':>12}   must be")
    for name, bound in stack.BOUNDS.items():
        shown = f"{results[name]:.3f}" if name in results else "not run"
        print(f"{name:<28}{shown:>12}   {bound}")
    return 0 if set(stack.BOUNDS) <= set(results) else 1


if __name__ == "__main__":
    sys.exit(main())
