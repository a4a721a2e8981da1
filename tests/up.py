"""A running `make up` with real vLLM, for tests and benchmarks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml
from redis import Redis
from supervisor.xmlrpc import SupervisorTransport

from services.local.__main__ import keys
from services.local.plan import ROOT, Dials
from tests.harness import free_ports, wait_for

MODEL = "smollm2-135m-instruct"
START_S = 400.0


def launch(state: Path, port: int, **dials: str) -> subprocess.Popen[str]:
    env = os.environ | {"STATE_DIR": str(state), "PORT": str(port), "PYTHONPATH": str(ROOT)} | dials
    return subprocess.Popen([sys.executable, "-m", "services.local", "up"], cwd=ROOT, env=env, text=True,
                            stdout=open(state.parent / f"up-{port}.log", "w"), stderr=subprocess.STDOUT)


@contextlib.contextmanager
def started(folder: Path, workers: int, **dials: str) -> "Iterator[Up]":
    """A `make up` from an empty state in `folder`; a bundled model that an earlier start has unpacked is not unpacked again."""
    state, kept = folder / "state", ROOT / ".state/models"
    state.mkdir(exist_ok=True)
    if kept.exists():
        (state / "models").symlink_to(kept)
    print(f"\nstarting {workers} real worker(s), about a minute", flush=True)
    up = Up(state, workers, **dials)
    try:
        yield up
    finally:
        up.launcher.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            up.launcher.wait(60)


class Up:
    """A running `make up`."""

    def __init__(self, state: Path, workers: int, **dials: str) -> None:
        self.state, self.port = state, free_ports(1)[0]
        self.log = state.parent / f"up-{self.port}.log"
        started = time.monotonic()
        self.launcher = launch(state, self.port, **({} if "MODELS_FILE" in dials else {"WORKERS": str(workers)}), **dials)
        wait_for(lambda: "OwnGPT is up" in self.screen() or self.launcher.poll() is not None, "up", START_S)
        assert self.launcher.poll() is None, self.screen()
        self.took_s = time.monotonic() - started
        self.base = f"http://127.0.0.1:{self.port}"
        self.key = (state / "api_key").read_text().strip()
        self.sdk = openai.OpenAI(base_url=self.base + "/v1", api_key=self.key, timeout=120, max_retries=0)

    def add_key(self, name: str) -> str:
        """One more API key."""
        return keys(Dials(self.state), "create", name)

    def screen(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def redis(self) -> Redis:
        return self.redis_as("gateway")

    def redis_as(self, user: str) -> Redis:
        """A client of the state redis with a service's rights."""
        dials = Dials(self.state)
        password = (dials.secrets / user / "redis_password").read_text().strip()
        return Redis.from_url(dials.redis_url, username=user, password=password, decode_responses=True)

    def scraped(self) -> dict:
        """Prometheus' configuration of this run."""
        return yaml.safe_load((Dials(self.state).run_dir / "prometheus.yml").read_text())

    def target(self, job: str) -> str:
        """host:port of a job's first target."""
        found = next(j for j in self.scraped()["scrape_configs"] if j["job_name"] == job)
        listed = found.get("static_configs") or json.loads(Path(found["file_sd_configs"][0]["files"][0]).read_text())
        return listed[0]["targets"][0]

    def program_pid(self, name: str) -> int:
        """The process id of one of the supervised programs."""
        transport = SupervisorTransport(None, None, f"unix://{Dials(self.state).run_dir}/supervisor.sock")
        proxy = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)
        return int(proxy.supervisor.getProcessInfo(name)["pid"])

    def ready(self) -> int:
        return int(httpx.get(self.base + "/ready").json().get("workers", {}).get("ready", 0))

    def engine_pids(self) -> list[int]:
        """Process ids of vLLM's API servers, one a worker."""
        found = subprocess.run(["pgrep", "-f", f"(services.worker.vllm.serve|vllm.entrypoints.openai.api_server) --model {self.state}"],
                               capture_output=True, text=True, check=False).stdout
        return [int(pid) for pid in found.split()]

    def everything(self) -> dict[int, str]:
        """Every process this launcher started, directly or not, by id."""
        found, waiting = {}, [self.launcher.pid]
        while waiting:
            pid = waiting.pop()
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    waiting += map(int, (task / "children").read_text().split())
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200]
        return found

    def kept(self) -> dict[str, Any]:
        """What a backup is to bring back, as clients see it."""
        headers = {"authorization": f"Bearer {self.key}"}

        def get(path: str) -> Any:
            return httpx.get(self.base + path, headers=headers, timeout=20)

        files, jobs = get("/v1/files?limit=10000").json()["data"], get("/v1/fine_tuning/jobs?limit=100").json()["data"]
        return {
            "files": files, "bytes": {f["id"]: len(get(f"/v1/files/{f['id']}/content").content) for f in files}, "jobs": jobs,
            "aliases": get("/v1/aliases").json()["data"], "usage": get("/v1/usage").json()["days"],
            "events": {j["id"]: get(f"/v1/fine_tuning/jobs/{j['id']}/events?limit=100").json()["data"] for j in jobs},
        }

    def ask(self, text: str, **options: object) -> object:
        """A short greedy chat, answered by a worker and not from memory."""
        return self.sdk.chat.completions.create(
            messages=[{"role": "user", "content": text}],
            **{"model": MODEL, "max_tokens": 16, "temperature": 0, "extra_headers": {"cache-control": "no-store"}, **options},
        )

    def records(self) -> list[str]:
        return [fields["r"] for _, fields in self.redis().xrange("usage")]
