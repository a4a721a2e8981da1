"""The agent, a worker's entry process: `python -m services.worker`.

Starts the engine, waits until it is healthy, announces it several times a second, and on SIGTERM takes it out of
the table first, lets what runs finish, then stops it. When the engine dies the agent leaves and exits with 1, and
whoever supervises it starts both again.
"""

import asyncio
import os
import signal
from pathlib import Path

from common import logs
from common.settings import read_settings
from services.worker import health
from services.worker.agent import Agent
from services.worker.settings import WorkerSettings


async def run(settings: WorkerSettings) -> tuple[int, bool]:
    """The agent's life: the exit status, and whether its engine ever came up."""
    agent = Agent(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, agent.stopping.set)
    return await agent.run(), agent.came_up


def main() -> None:
    """Check the settings, run the agent."""
    came_up = False
    try:
        settings = read_settings(WorkerSettings, "worker")
        logs.configure("worker", settings.log_level)
        status, came_up = asyncio.run(run(settings))
        raise SystemExit(status)
    except SystemExit as end:
        if end.code and not came_up and (alive := os.environ.get("ALIVE_FILE")):
            health.stay(Path(alive))
        raise


if __name__ == "__main__":
    main()
