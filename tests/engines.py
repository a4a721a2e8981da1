"""Engines beside each other behind one gateway, for tests and benchmarks: vLLM, llama.cpp, a llama.cpp server that somebody
else runs and that asks for a key, and the doubles of those that do not run here.
"""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import yaml

from bench.hosts import local
from services.local.model import bundled_file
from services.local.plan import ROOT
from tests import contract
from tests.harness import free_ports, wait_for
from tests.up import Up, started

ENGINES = {"chat": "vllm", "llama": "llamacpp", "theirs": "llamacpp", "trt": "trtllm", "sgl": "sglang"}
"""Model -> the engine whose fields are taken: that of somebody's server is recognised."""
HERE = ("chat", "llama", "theirs")
"""Those that are no doubles."""
KEY = "sk-of-their-server-0123456789"
THEIRS = """
import sys, threading, xllamacpp
told = xllamacpp.CommonParams()
told.model.path, told.model_alias, told.api_keys = sys.argv[1], {"their-name"}, [sys.argv[3]]
told.n_ctx, told.n_parallel, told.kv_unified, told.port, told.verbosity = 8192, 4, True, int(sys.argv[2]), 1
server = xllamacpp.Server(told)
threading.Event().wait()
"""


def catalog(ports: dict[str, int], *more: dict[str, object]) -> str:
    """models.yaml. `ports`: where those run that run already."""
    return yaml.safe_dump({"models": [
        {"name": "chat", "source": "bundled", "max_tokens": 4096},
        {"name": "llama", "source": "bundled", "engine": "llamacpp", "adapters": False},
        {"name": "theirs", "source": "their-name", "engine": "attached", "url": f"http://127.0.0.1:{ports['theirs']}/v1", "key_file": "key"},
        {"name": "trt", "source": "double", "engine": "trtllm", "url": f"http://127.0.0.1:{ports['trt']}", "max_tokens": 2048},
        {"name": "sgl", "source": "double", "engine": "sglang", "url": f"http://127.0.0.1:{ports['sgl']}"},
        *more,
    ]})


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[tuple[Up, dict[str, int]]]:
    """The stack, and the ports of the servers that it does not run."""
    ports = dict(zip(("theirs", "trt", "sgl"), free_ports(3), strict=True))
    (folder / "key").write_text(KEY)
    (folder / "models.yaml").write_text(catalog(ports))
    with contextlib.ExitStack() as running:
        for command in (["-c", THEIRS, str(bundled_file()), str(ports["theirs"]), KEY],
                        ["-m", "tests.doubles", "trtllm", str(ports["trt"])], ["-m", "tests.doubles", "sglang", str(ports["sgl"])]):
            process = running.enter_context(subprocess.Popen([sys.executable, *command], cwd=ROOT))
            running.callback(process.kill)
        with started(folder, 0, MODELS_FILE=str(folder / "models.yaml")) as up:
            yield up, ports


def client(up: Up) -> httpx.Client:
    """One that asks with the owner's key."""
    return httpx.Client(base_url=up.base, headers={"authorization": f"Bearer {up.key}"}, timeout=120)


def failover(up: Up, ports: dict[str, int]) -> list[str]:
    """llama.cpp joins as `chat`, and vLLM is killed while both answer: what requests that are no stream got that failed."""
    (up.state.parent / "models.yaml").write_text(catalog(ports, {"name": "chat", "engine": "llamacpp", "source": "bundled"}))
    done = local(up, "apply")
    assert done.returncode == 0, done.stdout + done.stderr
    by: set[str] = set()
    failed: list[str] = []
    over = threading.Event()

    def ask() -> None:
        with client(up) as asking:
            while not over.is_set():
                answer = asking.post(contract.CHAT, json={"model": "chat", **contract.chat()}, headers=contract.HEADERS)
                if answer.status_code == 200:
                    by.add(answer.headers["x-owngpt-worker"].rpartition("-")[0])
                else:
                    failed.append(answer.text)

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    try:
        wait_for(lambda: len(by) == 2, "both engines answer", 30)
        subprocess.run(["kill", "-9", *map(str, up.engine_pids())], check=True)
        time.sleep(8)
    finally:
        over.set()
        for thread in asking:
            thread.join()
    return failed
