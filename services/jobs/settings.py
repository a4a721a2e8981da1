"""What the jobs service can be told, read once from the environment. `.env.example` explains each."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from gateway.settings import Settings


class JobsSettings(Settings):
    """The gateway's settings, for batches go the gateway's way, and our own."""

    redis_user: str = "jobs"
    edge: Literal["nginx", "none"] = "none"
    files_dir: Path = Field(description="where uploaded and produced files are")
    max_file_bytes: int = Field(512 * 1024 * 1024, ge=1024)
    max_files_per_key: int = Field(1000, ge=1)
    max_waiting_jobs: int = Field(16, ge=1, description="fine-tuning jobs of one key that are not finished")
