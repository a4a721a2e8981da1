"""What the exporter can be told, read once from the environment."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class ExporterSettings(BaseSettings):
    """The exporter's settings; names are the environment variables in lower case."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    sample_every_s: float = Field(2.0, gt=0, description="how often driver and host are asked")
    disks: Annotated[tuple[Path, ...], NoDecode] = Field(
        (Path("/"),), description="folders whose file systems are watched, separated by spaces"
    )
    log_level: str = "INFO"

    @field_validator("disks", mode="before")
    @classmethod
    def _split(cls, text: object) -> object:
        return tuple(text.split()) if isinstance(text, str) else text
