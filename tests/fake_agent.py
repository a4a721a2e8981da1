"""The real agent before a scripted engine (`tests/fake_worker.py`) that takes a second to start instead of a minute."""

import asyncio
import os
import sys

from common import logs, places
from common.workers import Model
from services.worker import __main__ as worker
from services.worker import engines
from services.worker.engines.vllm import Vllm
from services.worker.settings import WorkerSettings


class Scripted(Vllm):
    """vLLM as far as the agent sees it."""

    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.fake_worker", "--silent"]

    def environment(self) -> dict[str, str]:
        return os.environ | super().environment()

    async def models(self) -> list[Model]:
        return [Model(self._settings.served_name, 8192, 1, revision="r1")]


if __name__ == "__main__":
    places.LEAST_AWAKE_S, places.NEW_S = 0.5, 0.3
    engines.Vllm = Scripted  # type: ignore[misc]
    settings = WorkerSettings()
    logs.configure("worker", "INFO")
    raise SystemExit(asyncio.run(worker.run(settings)))
