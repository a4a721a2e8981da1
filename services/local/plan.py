"""What a user can choose, and where one run listens and keeps its files."""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path

from services.local import model as bundled
from services.local.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


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


def read_dials() -> Dials:
    """The dials from the environment. Raises UserError naming the bad one."""
    state = Path(os.environ.get("STATE_DIR") or ROOT / ".state").absolute()
    chosen = os.environ.get("MODEL", "").strip()
    if chosen and ("/" in chosen or Path(chosen).exists()):
        folder = Path(chosen).expanduser()
        looks_local = chosen.startswith((".", "/", "~")) or folder.exists()
        if looks_local and not (folder / "config.json").exists():
            raise UserError(f"MODEL={chosen}: there is no checkpoint (no config.json) in that folder.")
        model = str(folder.resolve()) if looks_local else chosen
    elif chosen:
        raise UserError(f"MODEL={chosen}: neither a checkpoint folder nor a hub name like org/model.")
    else:
        model = str(state / "models" / bundled.NAME)
    try:
        workers, port = int(os.environ.get("WORKERS") or 1), int(os.environ.get("PORT") or 8080)
    except ValueError as error:
        raise UserError(f"WORKERS and PORT are whole numbers: {error}.") from error
    if not 1 <= workers <= 16:
        raise UserError(f"WORKERS={workers}: between 1 and 16 workers run on one machine.")
    name = os.environ.get("SERVED_MODEL_NAME") or (Path(model).name.lower() if Path(model).is_absolute() else model)
    return Dials(state=state, model=model, model_name=name, workers=workers, port=port,
                 host=os.environ.get("HOST") or "127.0.0.1")


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
