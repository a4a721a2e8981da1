"""What the jobs service can be told, read once from the environment. `.env.example` explains each."""

from functools import cached_property
from pathlib import Path

from pydantic import Field, field_validator

from common.database import DATABASE_URL
from common.settings import StateSettings, read_secret


class JobsSettings(StateSettings):
    """Its settings; names are the environment variables in lower case."""

    redis_user: str = "jobs"
    gateway_url: str = Field(pattern=r"^http://", description="the door by which batches ask: nginx' inner one")
    service_token_file: Path
    trainer_token_file: Path
    database_url: str = Field(pattern=DATABASE_URL, description="files, jobs and batches: SQLite or Postgres")
    files_dir: Path = Field(description="where uploaded and produced files are")
    max_file_bytes: int = Field(512 * 1024 * 1024, ge=1024)
    max_files_per_key: int = Field(1000, ge=1)
    max_stored_bytes_per_key: int = Field(20 * 1024**3, ge=1024)
    min_free_bytes: int = Field(2 * 1024**3, ge=0, description="free disk below which no upload is taken")
    max_waiting_batches: int = Field(100, ge=1, description="batches of one key that are not over")
    max_waiting_jobs: int = Field(16, ge=1, description="fine-tuning jobs of one key that are not finished")

    @field_validator("service_token_file", "trainer_token_file")
    @classmethod
    def _secret_readable(cls, path: Path) -> Path:
        read_secret(path)
        return path

    @cached_property
    def service_token(self) -> str:
        """By which the gateway knows this service."""
        return read_secret(self.service_token_file)

    @cached_property
    def trainer_token(self) -> str:
        """By which this service knows the trainer."""
        return read_secret(self.trainer_token_file)
