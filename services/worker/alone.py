"""The engine by itself, as the stack would start it: `python -m services.worker.alone` with a worker's environment.

For what measures an engine before it serves: no agent, no redis, no metering, and a key of its own (VLLM_API_KEY).
It ends with whoever started it.
"""

import os
import sys
from pathlib import Path

from pydantic_settings import SettingsConfigDict

from common.tie import tie_to_parent
from services.worker.settings import WorkerSettings
from services.worker.vllm import command


class Alone(WorkerSettings):
    """A worker's settings without those of the stack around it."""

    model_config = SettingsConfigDict(validate_default=False)
    redis_url: str = "redis://nobody"
    redis_password_file: Path = Path(os.devnull)
    worker_token_file: Path = Path(os.devnull)


def main() -> None:
    """Become the engine."""
    settings = Alone()
    if settings.engine != "vllm":
        sys.exit(f"owngpt: ENGINE={settings.engine}: only vllm is started by itself.")
    tie_to_parent()
    line = command.bare(settings)
    os.execve(line[0], line, command.environment(settings))  # noqa: S606 - no shell


if __name__ == "__main__":
    main()
