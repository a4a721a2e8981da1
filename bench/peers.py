"""The programs we compare with, each in a throw-away environment under .bench-env; never dependencies."""

import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"litellm": "litellm[proxy]==1.106.2", "vllm-router": "vllm-router==0.1.17"}
PIN = ["taskset", "-c", "0"]


def program(name: str) -> str:
    """The peer's command, installed on the first call."""
    folder = ROOT / ".bench-env" / name
    if not (folder / "bin" / name).exists():
        print(f"installing {name} into {folder} (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin/pip"), "install", "-q", PACKAGES[name]], check=True)
    return str(folder / "bin" / name)


def version(name: str) -> str:
    """The installed version, for the log."""
    folder = Path(program(name)).parents[1]
    shown = subprocess.run([str(folder / "bin/pip"), "show", name], capture_output=True, text=True, check=True).stdout
    return next(line.split()[1] for line in shown.splitlines() if line.startswith("Version"))


def start(command: list[str], url: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a server pinned to core 0 and wait until `url` answers 200."""
    process = subprocess.Popen([*PIN, *command], stdout=open(log, "ab"), stderr=subprocess.STDOUT)
    for _ in range(600):
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return process
        except httpx.HTTPError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.terminate()
    raise RuntimeError(f"{command[0]} did not start; see {log}")


def vllm_router(port: int, upstream: str, log: Path) -> subprocess.Popen[bytes]:
    """vllm-router (Rust) with its cheapest policy."""
    return start([program("vllm-router"), "--worker-urls", upstream, "--host", "127.0.0.1", "--port", str(port),
                  "--policy", "round_robin", "--log-level", "error"], f"http://127.0.0.1:{port}/health", log)


def litellm(port: int, upstream: str, key: str, folder: Path) -> subprocess.Popen[bytes]:
    """LiteLLM's proxy with a master key, one process, no database."""
    config = folder / "litellm.yaml"
    config.write_text(
        "model_list:\n  - model_name: mock\n    litellm_params:\n"
        f"      model: openai/mock\n      api_base: {upstream}/v1\n      api_key: none\n"
        f"general_settings:\n  master_key: {key}\n"
    )
    return start([program("litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port),
                  "--num_workers", "1"], f"http://127.0.0.1:{port}/health/liveliness", folder / "litellm.log")
