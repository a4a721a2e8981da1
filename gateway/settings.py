"""What the gateway can be told, read once from the environment. `.env.example` explains each.

A secret comes from a file named by its `_FILE` variable; a missing or short one stops the start.
"""

from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from common.settings import CACHE_URL, StateSettings, read_secret


class Settings(StateSettings):
    """The gateway's settings; names are the environment variables in lower case."""

    redis_user: str = "gateway"
    worker_token_file: Path
    service_token_file: Path
    cache_secret_file: Path
    answer_secret_file: Path
    cache_redis_url: str = Field("", pattern=CACHE_URL, description="redis-cache")
    cache_scope: Literal["key", "all"] = Field("key", description="who shares cached answers and KV blocks")
    answer_cache: Literal["on", "off"] = "on"
    answer_ttl_s: int = Field(3600, ge=1, description="how long an answer is kept")
    answer_max_bytes: int = Field(256 * 1024, ge=1024)
    response_ttl_s: int = Field(30 * 86400, ge=60, description="how long an unused response is kept (/v1/responses)")
    responses_max_bytes: int = Field(8 * 1024 * 1024, ge=0, description="of all responses of one key; 0: none are kept")
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    max_n: int = Field(16, ge=1)
    relay_connect_timeout_s: float = Field(2.0, gt=0)
    read_timeout_s: float = Field(600.0, gt=0, description="longest silence of a worker on the relay")
    otlp_traces_endpoint: str = Field("", description="where traces go (OTLP over HTTP); empty: nobody traces")
    wake_patience_s: float = Field(120.0, ge=0, description="how long a request waits for a model that sleeps")
    hold_back_s: int = Field(60, ge=1, description="how long a request that killed two workers is refused")

    @field_validator("worker_token_file", "service_token_file", "cache_secret_file", "answer_secret_file")
    @classmethod
    def _secrets_readable(cls, path: Path) -> Path:
        read_secret(path)
        return path

    @cached_property
    def cache_secret(self) -> str:
        """What keys the cache scopes' salts."""
        return read_secret(self.cache_secret_file)

    @cached_property
    def answer_secret(self) -> str:
        """What keys the checksums of answers; workers have it as well."""
        return read_secret(self.answer_secret_file)

    @cached_property
    def service_token(self) -> str:
        """By which our own services are known: they ask in the name of a key's owner."""
        return read_secret(self.service_token_file)

    @cached_property
    def worker_token(self) -> str:
        """The token that workers ask of whoever forwards a request."""
        return read_secret(self.worker_token_file)
