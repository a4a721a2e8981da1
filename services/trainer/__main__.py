"""The trainer: takes fine-tuning jobs from the jobs service, one at a time: `python -m services.trainer`.

Each run is a process of its own (`run.py`), so that a crash or a cancel ends the run and nothing else. A job in work is
leased; whoever starts after a crash takes it up again, and the run goes on from its last checkpoint.
"""

import datetime
import shutil
import signal
import threading
import time
from pathlib import Path

import httpx
from loguru import logger
from prometheus_client import start_http_server
from redis.exceptions import RedisError

from common import logs
from common.redis.connect import blocking
from common.redis.names import ADAPTERS
from common.settings import read_settings
from services.trainer.jobs import Jobs, LeaseLost
from services.trainer.place import is_time
from services.trainer.runner import Runner, Stopped
from services.trainer.settings import TrainerSettings

ASK_EVERY_S = 1.0
TIDY_EVERY_S = 600.0
KEPT_S = 3600.0
"""How long what nobody needs any more stays: a worker may be reading it, an engineer may want to look."""


class Trainer:
    """One trainer."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings = settings
        self._redis = blocking(settings)
        self._jobs = Jobs(settings.jobs_url, settings.trainer_token, settings.served_name)
        self._stopping = threading.Event()
        self._tidy_at = 0.0
        self._away = False

    def stop(self, *_: object) -> None:
        """Signal handler."""
        self._stopping.set()

    def serve(self) -> None:
        """Until told to stop."""
        logger.info("trainer up", model=self._settings.model)
        while not self._stopping.is_set():
            try:
                now = datetime.datetime.now(datetime.UTC).time()
                if is_time(self._settings.train_when, now) and (work := self._jobs.claim()) is not None:
                    Runner(self._settings, self._redis, work, self._stopping).run()
                    continue
                self._tidy()
                self._away = False
            except (RedisError, OSError, httpx.HTTPError) as error:
                if not self._away:
                    logger.warning("the jobs service or redis is away; trying again", error=str(error))
                self._away = True
            except LeaseLost:
                logger.warning("the job in work is somebody else's now")
            except Stopped:
                break
            self._stopping.wait(ASK_EVERY_S)
        logger.info("trainer down")

    def _tidy(self) -> None:
        """Remove adapters that were deleted from the registry, and the folders of runs whose jobs are over."""
        if time.monotonic() < self._tidy_at:
            return
        if registry := " ".join(map(str, self._redis.hvals(ADAPTERS))):  # an empty one may be a redis without its data
            known = {folder.name for folder in self._settings.adapters_dir.iterdir() if folder.name in registry}
            remove_old(self._settings.adapters_dir, known)
        remove_old(self._settings.runs_dir, self._jobs.unfinished(), keep="run.json")
        self._tidy_at = time.monotonic() + TIDY_EVERY_S


def remove_old(root: Path, wanted: set[str], keep: str = "") -> None:
    """Remove folders that nobody wants and nobody has changed for KEPT_S, but for the file `keep` in them."""
    for folder in root.iterdir():
        if folder.name in wanted or folder.stat().st_mtime > time.time() - KEPT_S:
            continue
        if not (keep and (folder / keep).exists()):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != keep:
                path.unlink(missing_ok=True)


def main() -> None:
    """Check the settings, serve."""
    settings = read_settings(TrainerSettings, "trainer")
    logs.configure("trainer", settings.log_level)
    for folder in (settings.runs_dir, settings.adapters_dir, settings.files_dir):
        folder.mkdir(parents=True, exist_ok=True)
    if settings.trainer_metrics_port:
        start_http_server(settings.trainer_metrics_port, settings.trainer_metrics_host)
    trainer = Trainer(settings)
    signal.signal(signal.SIGTERM, trainer.stop)
    signal.signal(signal.SIGINT, trainer.stop)
    trainer.serve()


if __name__ == "__main__":
    main()
