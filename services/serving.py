"""Serves the HTTP service of a folder below `services/`: python -m services.NAME --port N."""

import argparse

import uvicorn


def serve(name: str, description: str) -> None:
    """Parse the address and serve `services.NAME.app:from_environment` until told to stop."""
    parser = argparse.ArgumentParser(prog=f"python -m services.{name}", description=description)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    args = parser.parse_args()
    uvicorn.run(
        f"services.{name}.app:from_environment", factory=True, host=args.host, port=args.port, access_log=False,
        log_level="warning", server_header=False, date_header=False, timeout_keep_alive=75,
        timeout_graceful_shutdown=10,
    )
