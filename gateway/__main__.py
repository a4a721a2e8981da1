"""Serve the gateway: `python -m gateway`."""

import argparse
import os
import shutil
import sys
import tempfile

import uvicorn
from pydantic import ValidationError


def main() -> None:
    """Parse the few things that belong to the process rather than to the gateway, check the settings, serve."""
    parser = argparse.ArgumentParser(prog="python -m gateway", description="Serve the OwnGPT gateway.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000)")
    parser.add_argument("--processes", type=int, default=int(os.environ.get("GATEWAY_PROCESSES", "1")),
                        help="worker processes (default GATEWAY_PROCESSES or 1)")
    args = parser.parse_args()
    counters = None
    if args.processes > 1:
        # Each start gets a directory of its own, so that no other gateway wipes its counters.
        counters = os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="gateway-metrics-")
    from gateway.settings import Settings

    try:
        Settings()  # filled from the environment
    except ValidationError as error:
        for problem in error.errors():
            name = "_".join(str(part) for part in problem["loc"]).upper()
            print(f"gateway: {name}: {problem['msg']} (value: {problem.get('input')!r})", file=sys.stderr)
        raise SystemExit(1) from None
    try:
        uvicorn.run(
            "gateway.app:create", factory=True, host=args.host, port=args.port, workers=args.processes,
            loop="uvloop", http="httptools", access_log=False, log_level="warning", server_header=False,
            date_header=False, lifespan="on", timeout_keep_alive=75, backlog=4096, timeout_graceful_shutdown=120,
        )
    finally:
        if counters is not None:
            shutil.rmtree(counters, ignore_errors=True)


if __name__ == "__main__":
    main()
