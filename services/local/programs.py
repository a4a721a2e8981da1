"""The programs of the stack, as `make up` starts them. compose.yaml starts the same; a test compares the two."""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.local import places
from services.local.catalog import Entry
from services.local.configs import find_exporter, find_nginx
from services.local.plan import ROOT, Dials, Ports
from services.local.state_server import find_redis
from services.local.workers import Worker

SUPERVISOR_PROGRAM = """\
[program:{name}]
command={command}
directory={directory}
environment={environment}
autorestart=true
startsecs={start_s}
startretries=3
stopwaitsecs={stop_s}
stopsignal=TERM
priority={priority}
stdout_logfile={log}
stdout_logfile_maxbytes=20MB
stdout_logfile_backups=2
redirect_stderr=true
"""

GATEWAY_STOP_S = 130
"""Requests that it relays, or that wait for a model, are finished."""
WORKER_STOP_S = 150
"""Drained for DRAIN_TIMEOUT_S (120) at most, then the engine is stopped. Without nginx nobody is left to wait for."""


@dataclass(frozen=True)
class Program:
    """One supervised process."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    stop_s: int = 10
    start_s: int = 1
    priority: int = 100
    privileged: bool = False
    """Whether it keeps root's rights where root starts it."""


def cache_command(sock: Path, secrets: Path, maxmemory: str = "1gb") -> list[str]:
    """redis-cache on a unix socket, bounded to `maxmemory`, never on disk."""
    return [find_redis(), str(ROOT / "services/redis/cache.conf"), "--port", "0",
            "--unixsocket", str(sock), "--unixsocketperm", "700", "--dir", str(sock.parent),
            "--aclfile", str(secrets / "redis/cache.acl"), "--maxmemory", maxmemory]


def programs(dials: Dials, ports: Ports, workers: Sequence[Worker]) -> list[Program]:
    """The stack, in the order of a request's way back to front."""
    found = [*redis_servers(dials), *(worker(dials, one) for one in workers)]
    prometheus = shutil.which("prometheus")
    found += [
        gateway(dials, ports.gateway),
        ours("jobs", dials, ["--port", str(ports.jobs)], {
            "GATEWAY_URL": f"http://127.0.0.1:{ports.inner}", "FILES_DIR": str(dials.state / "files"),
            "DATABASE_URL": os.environ.get("JOBS_DATABASE_URL") or f"sqlite:///{dials.state.resolve()}/jobs.db",
        }, secrets=("redis_password", "service_token", "trainer_token")),
        ours("ledger", dials, ["--port", str(ports.ledger)], {
            "GPU_EXPORTER_URL": f"http://127.0.0.1:{ports.gpu_exporter}",
            "PROMETHEUS_URL": f"http://127.0.0.1:{ports.prometheus}" if prometheus else "",
            "DATABASE_URL": os.environ.get("LEDGER_DATABASE_URL") or f"sqlite:///{dials.state.resolve()}/ledger.db",
        }, secrets=("redis_password",)),
        ours("gpu_exporter", dials, ["--port", str(ports.gpu_exporter)], {"DISKS": str(dials.state)}),
        *([trainer(dials, ports, trained)] if (trained := dials.catalog.trained) is not None else []),
        Program("nginx", [
            find_nginx(), "-p", str(dials.run_dir), "-e", "stderr", "-c", str(dials.run_dir / "nginx.conf"),
        ], priority=40, privileged=True),
    ]
    if prometheus:
        found += [*exporters(dials, ports), prometheus_server(prometheus, dials, ports)]
    return found


def ours(
    name: str, dials: Dials, arguments: Sequence[str] = (), env: dict[str, str] | None = None,
    secrets: Sequence[str] = (), program: str = "", *, stop_s: int = 10, start_s: int = 1, priority: int = 30,
) -> Program:
    """A program of ours, `program` if it is not called `name`, with its own folder's secrets."""
    program = program or name
    module = program if program == "gateway" else f"services.{program}"
    shared = {
        "REDIS_URL": dials.redis_url, "CACHE_REDIS_URL": dials.cache_redis_url,
        "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT),
    }
    files = {f"{secret.upper()}_FILE": str(dials.secrets / program / secret) for secret in secrets}
    return Program(name, [sys.executable, "-m", module, *arguments], shared | files | (env or {}),
                   stop_s, start_s, priority)


def gateway(dials: Dials, port: int, name: str = "gateway") -> Program:
    """The gateway, or the next one, which takes over the socket."""
    return ours(name, dials, ["--port", str(port), "--socket", str(dials.gateway_socket)],
                secrets=("redis_password", "worker_token", "service_token", "cache_secret", "answer_secret"),
                program="gateway", stop_s=GATEWAY_STOP_S)


def redis_servers(dials: Dials) -> list[Program]:
    """State and cache, on unix sockets."""
    state = dials.state / "redis"
    command = [
        find_redis(state), str(ROOT / "services/redis/redis.conf"), "--port", "0", "--dir", str(state),
        "--unixsocket", str(dials.run_dir / "redis.sock"), "--unixsocketperm", "700",
        "--aclfile", str(dials.secrets / "redis/users.acl"),
        "--maxmemory", os.environ.get("REDIS_MAXMEMORY") or "800mb",
    ]  # fmt: skip
    cache = cache_command(
        dials.run_dir / "redis-cache.sock", dials.secrets, os.environ.get("CACHE_MAXMEMORY") or "1gb"
    )
    return [Program("redis", command, priority=10), Program("redis-cache", cache, priority=10)]


def worker(dials: Dials, one: Worker) -> Program:
    """One of the workers."""
    adapters = {} if os.environ.get("ADAPTERS_DIR") == "" else {"ADAPTERS_DIR": str(dials.state / "adapters")}
    return ours(one.name, dials, env={
        "WORKER_NAME": one.name,
        "ACCELERATOR": "cuda" if dials.gpus else "cpu",
        "ENGINE_PORT": str(one.port),
        "ADVERTISE_HOST": "127.0.0.1",
        "KV_TIER": os.environ.get("KV_TIER") or ("off" if dials.gpus else "redis"),
        "PROFILE_DIR": str(dials.state / "profiles" / one.name),
        **adapters,
        **one.env,
    }, secrets=("redis_password", "worker_token", "answer_secret", "kv_secret"), program="worker",
        stop_s=WORKER_STOP_S, start_s=5, priority=20)  # fmt: skip


def trainer(dials: Dials, ports: Ports, base: Entry) -> Program:
    """The trainer."""
    return ours("trainer", dials, env={
        "MODEL": base.model(dials.models),
        "MODEL_REVISION": base.revision,
        "SERVED_MODEL_NAME": base.name,
        "JOBS_URL": f"http://127.0.0.1:{ports.jobs}",
        "FILES_DIR": str(dials.state / "files"),
        "RUNS_DIR": str(dials.state / "runs"),
        "ADAPTERS_DIR": str(dials.state / "adapters"),
        "TRAINER_METRICS_PORT": str(ports.trainer),
        **trains_on(dials, base),
    }, secrets=("redis_password", "worker_token", "trainer_token"), stop_s=15)


def trains_on(dials: Dials, base: Entry) -> dict[str, str]:
    """The first GPU of the model that is trained, whose engines sleep meanwhile. On a CPU: with TRAIN_ALONE."""
    place = places.deal(dials.catalog, dials.gpus)[base.slug][0]
    return places.visible(place.gpus[:1]) | {"PLACE": place.name} if place.gpus else {}


def prometheus_server(program: str, dials: Dials, ports: Ports) -> Program:
    """The system's Prometheus."""
    return Program("prometheus", [
        program, f"--config.file={dials.run_dir}/prometheus.yml", f"--storage.tsdb.path={dials.state}/prometheus",
        f"--web.listen-address=127.0.0.1:{ports.prometheus}",
        f"--storage.tsdb.retention.time={os.environ.get('METRICS_RETENTION') or '30d'}",
        "--storage.tsdb.retention.size=4GB", "--enable-feature=exemplar-storage",
    ], priority=50)


def exporters(dials: Dials, ports: Ports) -> list[Program]:
    """The system's exporters for nginx and redis, where they are installed."""
    found = []
    if redis := find_exporter("redis"):
        # The password goes through the shell, so that it stands in no file but its own and in no command line.
        found.append(Program("redis-exporter", [
            "sh", "-c", 'REDIS_PASSWORD=$(cat "$0") exec "$@"', str(dials.secrets / "monitor/redis_password"), redis,
            "-redis.user", "monitor", "-redis.addr", "", "-web.listen-address", f"127.0.0.1:{ports.redis_exporter}",
            "-check-key-groups", "^(%a+)", "-check-keys-batch-size", "50",
        ], priority=50))
    if nginx := find_exporter("nginx"):
        found.append(Program("nginx-exporter", [
            nginx, "-nginx.scrape-uri", f"http://127.0.0.1:{ports.nginx_status}/status",
            "-web.listen-address", f"127.0.0.1:{ports.nginx_exporter}",
        ], priority=50))
    return found


def supervisor_config(dials: Dials, wanted: list[Program]) -> str:
    """supervisord's configuration: the programs, tethered, restarted when they die."""
    run_dir = dials.run_dir
    head = f"""\
[supervisord]
logfile={dials.state}/logs/supervisord.log
pidfile={run_dir}/supervisord.pid
childlogdir={dials.state}/logs
nodaemon=true
silent=true
[unix_http_server]
file={run_dir}/supervisor.sock
chmod=0700
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{run_dir}/supervisor.sock
"""
    def tether(program: Program) -> list[str]:
        return [sys.executable, "-m", "services.local.tether", *(["--privileged"] if program.privileged else [])]

    return head + "".join(
        SUPERVISOR_PROGRAM.format(
            name=program.name,
            command=" ".join(_quote(part) for part in [*tether(program), *program.command]),
            directory=ROOT,
            environment=",".join(f"{k}={_quote(v)}" for k, v in program.env.items()),
            start_s=program.start_s,
            stop_s=program.stop_s,
            priority=program.priority,
            log=dials.state / "logs" / f"{program.name}.log",
        )
        for program in wanted
    )


def _quote(text: str) -> str:
    """A word for supervisord's config, where % and quotes are special."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'
