"""What all programs are told: where the state redis is, and how secrets are read.

A secret comes from a file named by its `_FILE` variable; a missing or short one stops the start.
"""

import sys
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MIN_SECRET_CHARS = 24
CACHE_URL = r"^(rediss?://[^/?@]+(/\d+)?|unix:///[^?]+(\?db=\d+)?)?$"
"""redis-cache: a place and a number, nothing else (`common/redis/pipelined.py`)."""


def read_secret(path: Path) -> str:
    """The secret in a file.

    Raises ValueError when the file is missing or the secret is shorter than MIN_SECRET_CHARS.
    """
    try:
        secret = path.read_text().strip()
    except OSError as error:
        raise ValueError(f"cannot read the secret file {path}: {error.strerror}") from error
    if len(secret) < MIN_SECRET_CHARS:
        raise ValueError(f"the secret in {path} has {len(secret)} characters; at least {MIN_SECRET_CHARS} are needed")
    return secret


class StateSettings(BaseSettings):
    """Where the state redis is: the part that gateway and workers share."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    redis_url: str = Field(
        pattern=r"^(redis|rediss|unix)://", description="the state redis, without a password"
    )
    redis_user: str
    redis_password_file: Path
    log_level: str = "INFO"

    @field_validator("redis_password_file")
    @classmethod
    def _readable(cls, path: Path) -> Path:
        read_secret(path)
        return path

    @cached_property
    def redis_password(self) -> str:
        """The password in `redis_password_file`."""
        return read_secret(self.redis_password_file)


class PlaceSettings(StateSettings):
    """Where engines and trainings take turns (`common/places.py`): the part that workers and the trainer share."""

    train_alone: Literal["on", "off"] = Field("off", description="on: engines on a CPU sleep while a training runs")
    place: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$", description="a GPU or CPU shared with others; empty: its own")

    @property
    def shared_place(self) -> str:
        """Whose turns it takes; empty: it shares nothing."""
        return self.place or ("cpu" if self.train_alone == "on" else "")


Kind = TypeVar("Kind", bound=BaseSettings)


def read_settings(kind: type[Kind], program: str) -> Kind:
    """A program's settings from the environment. What is wrong is printed, by variable, and ends the process with 1."""
    try:
        return kind()
    except ValidationError as error:
        for problem in error.errors():
            name = "_".join(str(part) for part in problem["loc"]).upper()
            print(f"{program}: {name}: {problem['msg']} (value: {problem.get('input')!r})", file=sys.stderr)
        raise SystemExit(1) from None
