"""What the trainer can be told, read once from the environment. `.env.example` explains each."""

from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field

from common.checkpoint import served_name
from common.settings import PlaceSettings, read_secret


class TrainerSettings(PlaceSettings):
    """Names are the environment variables in lower case."""

    redis_user: str = "trainer"
    worker_token_file: Path
    trainer_token_file: Path
    jobs_url: str = Field(pattern=r"^http://", description="the jobs service, which leases jobs to this one")
    model: str = Field(description="the checkpoint folder, or the hub's name, of what the workers serve")
    model_revision: str = Field("", description="of a model from the hub; empty: main")
    served_model_name: str = Field("", description="the name clients use; default: the last part of MODEL")
    files_dir: Path
    runs_dir: Path = Field(description="one folder a job: plan, checkpoints, log, run.json")
    adapters_dir: Path = Field(description="published adapters; workers read it")
    train_max_tokens: int = Field(1024, ge=32, description="longer rows are cut")
    train_four_bit: bool | Literal["auto"] = Field(
        "auto", description="load the base in 4 bits (GPU only); auto: where 16 do not fit"
    )
    train_when: str = Field(
        "idle", pattern=r"^(idle|now|([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d)$",
        description="with PLACE: when nobody was served for a minute, at once, or between two times of day (UTC)",
    )
    trainer_metrics_host: str = "127.0.0.1"
    trainer_metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus text; 0: none")

    @cached_property
    def worker_token(self) -> str:
        """The token workers ask for."""
        return read_secret(self.worker_token_file)

    @cached_property
    def trainer_token(self) -> str:
        """By which the jobs service knows the trainer."""
        return read_secret(self.trainer_token_file)

    @property
    def served_name(self) -> str:
        """The base model's public name, as the workers have it."""
        return served_name(self.served_model_name, self.model)
