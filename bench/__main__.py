"""`python -m bench [stack|kv|lifecycle|observability|faults|hosts|engines|scale]`: run a set of figures, print its table, write bench/results/NAME.json."""

import argparse
import json
import sys
from pathlib import Path

from bench import engines, faults, hosts, kv, lifecycle, observability, scale, stack

SETS = {"stack": stack, "kv": kv, "lifecycle": lifecycle, "observability": observability,
        "faults": faults, "hosts": hosts, "engines": engines, "scale": scale}


def main() -> int:
    """0 when every figure was measured, whether or not it reaches its bound."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="?", default="stack", choices=sorted(SETS))
    parser.add_argument("--only", nargs="*", help="figure groups to run (default: all); the rest keep their last value")
    args = parser.parse_args()
    path = Path(__file__).parent / "results" / f"{args.name}.json"
    path.parent.mkdir(exist_ok=True)
    results: dict[str, float] = json.loads(path.read_text()) if args.only and path.exists() else {}
    chosen = SETS[args.name]
    if unknown := set(args.only or []) - set(chosen.GROUPS):
        parser.error(f"no such group: {', '.join(sorted(unknown))}; there are: {', '.join(chosen.GROUPS)}")
    for name, measure in chosen.GROUPS.items():
        if not args.only or name in args.only:
            print(f"== {name}", flush=True)
            results.update(measure())
            path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{'figure':<28}{'measured':>12}   must be")
    for name, bound in chosen.BOUNDS.items():
        shown = f"{results[name]:.3f}" if name in results else "not run"
        print(f"{name:<28}{shown:>12}   {bound}")
    return 0 if set(chosen.BOUNDS) <= set(results) else 1


if __name__ == "__main__":
    sys.exit(main())
