"""Starts real redis, the gateway and real nginx around scripted workers, from the launcher's own templates."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import msgspec
from redis import Redis

from common.keys import ApiKey, make
from common.redis.names import api_key_key
from services.local.configs import find_nginx, write_configs
from services.local.plan import ROOT, Dials, Ports, is_free
from services.local.programs import cache_command
from services.local.state_server import find_redis
from services.secrets.__main__ import make as make_secrets
from services.worker.middleware import WORKER_ID


def wait_for(check: Callable[[], object], what: str, timeout_s: float = 10.0) -> None:
    """Poll until `check` is true. Raises AssertionError saying what did not happen."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError, OSError):
            if check():
                return
        time.sleep(0.02)
    raise AssertionError(f"after {timeout_s:g} s: not {what}")


BLOCK = 30  # a stack's programs listen next to its port
BLOCKS = itertools.cycle(range(10000, 32000, BLOCK))
for _ in range(os.getpid() % 1000):  # two runs on one machine seldom ask for the same ports
    next(BLOCKS)


def free_ports(count: int) -> list[int]:
    """Free loopback ports, each answer apart from the last ones.

    All lie below 32768: from there on the system gives ports to clients, and one that was free when asked for may be taken
    by any connection made since.
    """
    for _ in range(1000):
        block = next(BLOCKS)
        found = [port for port in range(block, block + BLOCK) if is_free(port)][:count]
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} free ports side by side")


class Cache:
    """A real redis-cache that tests stop, freeze and fill."""

    def __init__(self, folder: Path, maxmemory: str = "1gb") -> None:
        self.folder, self.sock = folder, folder / "c.sock"
        make_secrets(folder / "secrets")
        with open(folder / "secrets/redis/cache.acl", "a") as acl:
            acl.write("user admin on nopass ~* &* +@all\n")
        self.start(maxmemory)

    def start(self, maxmemory: str = "1gb") -> None:
        self.process = subprocess.Popen(cache_command(self.sock, self.folder / "secrets", maxmemory),
                                        stdout=subprocess.DEVNULL)
        wait_for(self.sock.exists, "a redis-cache socket")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.sock.unlink(missing_ok=True)

    @property
    def url(self) -> str:
        return f"unix://{self.sock}?db=0"

    @property
    def password(self) -> str:
        return (self.folder / "secrets/worker/redis_password").read_text().strip()

    def client(self, user: str = "admin") -> Redis:
        return Redis.from_url(self.url, username=user, password=self.password)


class Stack:
    """redis, gateway and nginx as processes; workers are added by tests."""

    def __init__(
        self, folder: Path, *, processes: int = 1, edge: str = "nginx", prefix: Sequence[str] = (),
        worker_ports: Sequence[int] = (), redis_maxmemory: str = "800mb",
    ) -> None:
        self.folder, self.edge, self.prefix, self.redis_maxmemory = folder, edge, list(prefix), redis_maxmemory
        free = iter(free_ports(24))
        self.port = next(free)
        self.ports = Ports.take(free, 12)
        if worker_ports:
            self.ports = replace(self.ports, workers=tuple(worker_ports))
        self.gateway_port, self.worker_ports = self.ports.gateway, list(self.ports.workers)
        self.dials = Dials(folder, port=self.port)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.dials.run_dir.mkdir(mode=0o711, exist_ok=True)
        make_secrets(self.dials.secrets)
        write_configs(self.dials, self.ports)
        self.start_redis()
        self.start_cache()
        self.gateway_args = ["--port", str(self.gateway_port), "--socket", str(self.dials.gateway_socket),
                             "--processes", str(processes)]
        self.start_gateway()
        if edge == "nginx":
            run_dir = str(self.dials.run_dir)
            self.spawn("nginx", [find_nginx(), "-p", run_dir, "-e", "stderr", "-c", f"{run_dir}/nginx.conf"])
        self.base = f"http://127.0.0.1:{self.port if edge == 'nginx' else self.gateway_port}"
        wait_for(lambda: httpx.get(self.base + "/health").status_code == 200, "healthy")
        self.key, self.record = self.add_key("test")

    def env(self, who: str) -> dict[str, str]:
        secrets = self.dials.secrets / who
        return os.environ | {
            "REDIS_URL": self.dials.redis_url, "PYTHONPATH": str(ROOT), "EDGE": self.edge,
            "DATABASE_URL": f"sqlite:///{self.folder}/{who}.db", "HOLD_BACK_S": os.environ.get("HOLD_BACK_S") or "5", "CACHE_REDIS_URL": self.dials.cache_redis_url,
            **{f"{path.name.upper()}_FILE": str(path) for path in secrets.iterdir() if path.suffix == ""},
        }

    def spawn(self, name: str, command: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen([*self.prefix, *command], env=env, cwd=ROOT, stdout=log, stderr=log)
        return self.running[name]

    def start_redis(self) -> None:
        self.spawn("redis", [find_redis(), str(ROOT / "services/redis/redis.conf"), "--port", "0", "--unixsocket",
                             str(self.dials.run_dir / "redis.sock"), "--dir", str(self.folder),
                             "--aclfile", str(self.dials.secrets / "redis/users.acl"), "--maxmemory", self.redis_maxmemory])
        wait_for(lambda: (self.dials.run_dir / "redis.sock").exists(), "a redis socket")

    def start_cache(self) -> None:
        self.spawn("redis-cache", cache_command(self.dials.run_dir / "redis-cache.sock", self.dials.secrets))
        wait_for(lambda: (self.dials.run_dir / "redis-cache.sock").exists(), "a redis-cache socket")

    def start_gateway(self) -> None:
        self.spawn("gateway", [sys.executable, "-m", "gateway", *self.gateway_args], self.env("gateway"))

    def redis(self, user: str = "gateway") -> Redis:
        """A client with a service's rights."""
        password = (self.dials.secrets / user / "redis_password").read_text().strip()
        return Redis.from_url(self.dials.redis_url, username=user, password=password, decode_responses=True)

    def cache(self) -> Redis:
        """A client of redis-cache that may do what the gateway may."""
        password = (self.dials.secrets / "gateway/redis_password").read_text().strip()
        return Redis.from_url(self.dials.cache_redis_url, username="gateway", password=password)

    def add_key(self, name: str, scope: str = "") -> tuple[str, ApiKey]:
        key, record = make(name, scope)
        self.redis().set(api_key_key(record.id), msgspec.json.encode(record))
        return key, record

    def add_worker(self, name: str, *args: str) -> str:
        """Start a scripted worker and wait until the gateway knows it. Returns its id."""
        port = self.worker_ports[len([n for n in self.running if n.startswith("w")])]
        env = self.env("worker") | {"ENGINE_PORT": str(port), "ADVERTISE_HOST": "127.0.0.1", WORKER_ID: name,
                                    "MODEL": "/nowhere", "SERVED_MODEL_NAME": "fake"}
        before = self.ready_count()
        self.spawn(name, [sys.executable, "-m", "tests.fake_worker", *args], env)
        wait_for(lambda: self.ready_count() > before, f"worker {name} known")
        return name

    def add_fronted(self, name: str, **more: str) -> str:
        """Somebody else's server, scripted, without our middleware; before it the real agent and the real front."""
        port, theirs = self.worker_ports[len([n for n in self.running if n.startswith("w")])], free_ports(1)[0]
        self.spawn(f"{name}-engine", [sys.executable, "-m", "tests.fake_worker", "--bare"], os.environ | {"ENGINE_PORT": str(theirs)})
        env = self.env("worker") | {"ENGINE_PORT": str(port), "ADVERTISE_HOST": "127.0.0.1", "WORKER_NAME": name,
                                    "ENGINE": "attached", "ENGINE_URL": f"http://127.0.0.1:{theirs}", **more}
        before = self.ready_count()
        self.spawn(name, [sys.executable, "-m", "services.worker"], env)
        wait_for(lambda: self.ready_count() > before, f"{name} known", 20)
        return name

    def ready_count(self) -> int:
        return int(httpx.get(self.base + "/ready").json().get("workers", {}).get("ready", 0))

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        self.running[name].send_signal(number)
        if number == signal.SIGKILL:
            self.running[name].wait()

    def client(self, **kwargs: object) -> httpx.Client:
        return httpx.Client(base_url=self.base, headers={"authorization": f"Bearer {self.key}"}, timeout=20, **kwargs)

    def chat(self, script: str, **fields: object) -> httpx.Response:
        with self.client() as client:
            return client.post("/v1/chat/completions", json=body(script, **fields))

    def records(self, count: int = 1) -> list[dict]:
        """The usage stream, once it has at least `count` entries."""
        redis = self.redis()
        wait_for(lambda: redis.xlen("usage") >= count, f"{count} usage records")
        return [json.loads(fields["r"]) for _, fields in redis.xrange("usage")]

    def log(self, name: str) -> list[dict]:
        lines = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def close(self) -> None:
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


def body(script: str, **fields: object) -> dict:
    """A chat request for a scripted worker."""
    return {"model": "fake", "messages": [{"role": "user", "content": script}], **fields}


@contextlib.contextmanager
def running(folder: Path, kind: type[Stack] = Stack, **kwargs: object) -> Iterator[Stack]:
    """A stack that is gone afterwards, also when its start failed half-way."""
    stack = kind.__new__(kind)
    stack.running = {}
    try:
        stack.__init__(folder, **kwargs)
        yield stack
    finally:
        stack.close()
