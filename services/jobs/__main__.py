"""`python -m services.jobs --port N`: serve the jobs service."""

import argparse

import uvicorn


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m services.jobs", description="Files, fine-tuning jobs and batches.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    args = parser.parse_args()
    uvicorn.run(
        "services.jobs.app:from_environment",
        factory=True,
        host=args.host,
        port=args.port,
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=10,
    )


if __name__ == "__main__":
    main()
