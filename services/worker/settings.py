"""What a worker can be told, read once from the environment. `.env.example` explains each."""

import shlex
import socket
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field

from gateway.settings import StateSettings, read_secret


class WorkerSettings(StateSettings):
    """The agent's and the middleware's settings; names are the environment variables in lower case."""

    redis_user: str = "worker"
    worker_token_file: Path
    worker_name: str = Field(default_factory=socket.gethostname, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")
    accelerator: Literal["cpu", "cuda"] = "cpu"
    model: str = Field(description="a checkpoint folder or a hub name")
    served_model_name: str = Field("", description="the name clients use; default: the last part of MODEL")
    engine_host: str = "127.0.0.1"
    engine_port: int = 8000
    advertise_host: str = Field("", description="how nginx reaches this worker; default: this host's address")
    max_model_len: int = Field(0, ge=0, description="0: what the model says")
    max_num_seqs: int = Field(64, ge=1)
    kv_cache_gib: int = Field(1, ge=1, description="CPU only: memory for KV blocks")
    gpu_memory_utilization: float = Field(0.90, gt=0, le=1)
    tensor_parallel_size: int = Field(1, ge=1)
    quantization: str = ""
    tool_call_parser: str = "hermes"
    cpu_threads_bind: str = Field("", description="CPU only: VLLM_CPU_OMP_THREADS_BIND; default: by core count")
    engine_args: str = Field("", description="further vLLM flags, as on a command line")
    start_timeout_s: float = Field(1800.0, gt=0)
    drain_timeout_s: float = Field(120.0, ge=0)
    heartbeat_s: float = Field(0.2, gt=0, le=1)
    stall_s: float = Field(3.0, gt=0, description="no engine step for this long while requests run: stalled")

    @cached_property
    def worker_token(self) -> str:
        """The token asked of whoever forwards a request."""
        return read_secret(self.worker_token_file)

    @property
    def served_name(self) -> str:
        """The model's public name."""
        return self.served_model_name or Path(self.model).name.lower()

    @property
    def extra_args(self) -> list[str]:
        """`engine_args` split as a shell would."""
        return shlex.split(self.engine_args)

    @property
    def address(self) -> str:
        """host:port as nginx and the gateway reach the engine."""
        return f"{self.advertise_host or socket.gethostbyname(socket.gethostname())}:{self.engine_port}"
