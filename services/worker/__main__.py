"""The agent, a worker's entry process: `python -m services.worker`.

Starts the engine, waits until it is healthy, announces it several times a second, and on SIGTERM takes it out of
the table first, lets what runs finish, then stops it. When the engine dies the agent leaves and exits with 1, and
whoever supervises it starts both again.
"""

import asyncio
import signal

from common import logs
from common.settings import read_settings
from services.worker.agent import Agent
from services.worker.settings import WorkerSettings


async def run(settings: WorkerSettings) -> int:
    """The agent's life; the exit status."""
    agent = Agent(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, agent.stopping.set)
    return await agent.run()


def main() -> None:
    """Check the settings, run the agent."""
    settings = read_settings(WorkerSettings, "worker")
    logs.configure("worker", settings.log_level)
    raise SystemExit(asyncio.run(run(settings)))


if __name__ == "__main__":
    main()
