"""What a worker can be told, read once from the environment. `.env.example` explains each."""

import shlex
import socket
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from common.checkpoint import served_name
from common.settings import CACHE_URL, PlaceSettings, read_secret


class WorkerSettings(PlaceSettings):
    """The agent's and the middleware's settings; names are the environment variables in lower case."""

    redis_user: str = "worker"
    worker_token_file: Path
    worker_name: str = Field(default_factory=socket.gethostname, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")
    accelerator: Literal["cpu", "cuda"] = "cpu"
    engine: Literal["vllm", "llamacpp", "trtllm", "sglang", "attached"] = Field(
        "vllm", description="what runs the model; the last three run at ENGINE_URL"
    )
    engine_url: str = Field("", pattern=r"^(https?://[^/\s]+(/\S*)?)?$", description="where the engine runs already")
    engine_key_file: Path | None = Field(None, description="holds the key that the server at ENGINE_URL asks for")
    model: str = Field("", description="a checkpoint folder, a hub name, a GGUF file; at ENGINE_URL: its name there")
    model_revision: str = Field("", description="a hub model's commit, tag or branch; empty: its main branch's")
    served_model_name: str = Field("", description="the name clients use; default: the last part of MODEL")
    engine_host: str = "127.0.0.1"
    engine_port: int = 8000
    advertise_host: str = Field("", description="how nginx reaches this worker; default: this host's address")
    read_timeout_s: float = Field(600.0, gt=0, description="longest silence of an engine behind a front")
    max_model_len: int = Field(0, ge=0, description="0: what the model says")
    max_num_seqs: int = Field(0, ge=0, description="requests at once; 0: 64 on a CPU, what the card takes on a GPU")
    kv_cache_gib: int = Field(1, ge=1, description="CPU only: memory for KV blocks")
    gpu_memory_utilization: float = Field(0.90, gt=0, le=1)
    tensor_parallel_size: int = Field(1, ge=1)
    tool_call_parser: str = Field("", description="how the model writes tool calls; empty: as its family does")
    adapters_dir: Path | None = Field(None, description="published LoRA adapters; unset: none can be served")
    max_loras: int = Field(4, ge=0, description="different adapters in one engine step; 0: none are served")
    kv_tier: Literal["redis", "off"] = Field("off", description="redis: share KV blocks through redis-cache")
    cache_redis_url: str = Field("", pattern=CACHE_URL, description="redis-cache")
    kv_secret_file: Path | None = None
    answer_secret_file: Path | None = Field(None, description="keys the checksums of answers; unset: none are kept")
    kv_host_gib: float = Field(0.5, gt=0, description="host memory between the engine's KV blocks and redis-cache")
    kv_ttl_s: int = Field(86400, ge=60, description="how long an unused block stays in redis-cache")
    cpu_threads_bind: str = Field("", description="CPU only: VLLM_CPU_OMP_THREADS_BIND; default: by core count")
    otlp_traces_endpoint: str = Field("", description="where traces go (OTLP over HTTP); empty: nobody traces")
    engine_args: str = Field("", description="further vLLM flags, as on a command line")
    profile_dir: Path | None = Field(None, description="where profiles are asked for and put; unset: there are none")
    on_demand: bool = Field(False, description="start the engine when requests wait for it, and take turns")
    awake_at_once: int = Field(1, ge=1, description="on_demand workers of one place that are awake at once")
    alive_file: Path | None = Field(None, description="touched while all is well: what a health check looks at")
    start_timeout_s: float = Field(1800.0, gt=0)
    drain_timeout_s: float = Field(120.0, ge=0)
    heartbeat_s: float = Field(0.2, gt=0, le=1)
    stall_s: float = Field(3.0, gt=0, description="no engine step for this long while requests run: stalled")
    stall_restart_s: float = Field(180.0, gt=0, description="stalled for so long: the engine is started again")

    @cached_property
    def worker_token(self) -> str:
        """The token asked of whoever forwards a request."""
        return read_secret(self.worker_token_file)

    @cached_property
    def engine_key(self) -> str:
        """What the server at ENGINE_URL asks for; empty: nothing."""
        return self.engine_key_file.read_text().strip() if self.engine_key_file is not None else ""

    @cached_property
    def kv_secret(self) -> str:
        """The key of the digests in KV blocks; all workers of a deployment share it."""
        assert self.kv_secret_file is not None  # noqa: S101 - checked at the start
        return read_secret(self.kv_secret_file)

    @cached_property
    def answer_secret(self) -> str:
        """The key of the checksums of answers, the gateway's as well."""
        assert self.answer_secret_file is not None  # noqa: S101 - asked for before
        return read_secret(self.answer_secret_file)

    @property
    def shared_place(self) -> str:
        """Whose turns it takes; an engine elsewhere takes none: it gives no memory free here."""
        return super().shared_place if self.engine in ("vllm", "llamacpp") else ""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kv_tier == "redis" and not (self.cache_redis_url and self.kv_secret_file):
            raise ValueError("KV_TIER=redis needs CACHE_REDIS_URL and KV_SECRET_FILE")
        if self.kv_secret_file is not None:
            read_secret(self.kv_secret_file)
        if self.answer_secret_file is not None:
            read_secret(self.answer_secret_file)
        started = self.engine in ("vllm", "llamacpp")
        if self.on_demand and not (self.place and started):
            raise ValueError("ON_DEMAND needs PLACE, and an engine that can be started")
        if not started and not self.engine_url:
            raise ValueError(f"ENGINE={self.engine} needs ENGINE_URL")
        if started and not self.model:
            raise ValueError(f"ENGINE={self.engine} needs MODEL")
        if self.engine_key_file is not None:
            try:
                self.engine_key_file.read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"cannot read ENGINE_KEY_FILE={self.engine_key_file}: {error}") from error
        return self

    @property
    def served_name(self) -> str:
        """The model's public name."""
        return served_name(self.served_model_name, self.model)

    @property
    def extra_args(self) -> list[str]:
        """`engine_args` split as a shell would."""
        return shlex.split(self.engine_args)

    @property
    def address(self) -> str:
        """host:port as nginx and the gateway reach the engine."""
        return f"{self.advertise_host or socket.gethostbyname(socket.gethostname())}:{self.engine_port}"
