"""The compose stack in real containers, for tests and benchmarks."""

import contextlib
import os
import subprocess
from collections.abc import Iterator

import openai

from services.local.plan import ROOT
from tests.harness import free_ports

PORT = free_ports(1)[0]
PROJECT = "owngpt-test"
ENV = os.environ | {"PORT": str(PORT), "BACKEND_PREFIX": "172.31.241", "COMPOSE_PROJECT_NAME": PROJECT,
                    "ALERT_WEBHOOK_URL": "http://ledger:8000/alerts?a=1&b=|x'y"}
BASE = f"http://127.0.0.1:{PORT}"


def docker(*args: str, timeout_s: float = 900, check: bool = True) -> str:
    done = subprocess.run(["docker", *args], cwd=ROOT, env=ENV, capture_output=True, text=True,
                          timeout=timeout_s, check=False)
    if check and done.returncode:
        raise AssertionError(f"docker {' '.join(args)}: {done.stderr[-3000:]}")
    return done.stdout


def no_engine() -> str:
    """Why containers cannot run here, or nothing."""
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return "there is no docker command"
    return "" if done.returncode == 0 else "no Docker engine answers (docker info)"


@contextlib.contextmanager
def composed() -> Iterator[openai.OpenAI]:
    """The stack, built and up; an SDK client with a fresh key. Volumes are removed afterwards."""
    print("\nbuilding the images (a few minutes the first time)", flush=True)
    docker("compose", "build", timeout_s=1800)
    print("starting the containers", flush=True)
    try:
        docker("compose", "up", "-d", "--wait")
        key = docker("compose", "exec", "-T", "gateway", "python", "-m", "gateway.keys", "create", "test").strip()
        yield openai.OpenAI(base_url=BASE + "/v1", api_key=key, timeout=120, max_retries=0)
    finally:
        print("\n" + docker("compose", "ps", "-a", check=False), flush=True)
        docker("compose", "--profile", "monitoring", "--profile", "restart", "down", "-v", "--remove-orphans", "--timeout", "20", check=False)

