"""The GPU that a training shares with engines (`common/places.py`): they sleep while it has it, and wake afterwards."""

import contextlib
import datetime
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from loguru import logger
from redis import Redis
from redis.exceptions import RedisError

from common import places
from common.places import Saying, Stage
from common.redis.names import WORKERS, worker_key
from common.workers import Heartbeat
from services.trainer.settings import TrainerSettings

IDLE_S = 60.0
"""TRAIN_WHEN=idle: nobody was served for so long."""
SAY_EVERY_S = 1.0
ASK_EVERY_S = 0.2
WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


def is_time(when: str, now: datetime.time) -> bool:
    """Whether TRAIN_WHEN lets a job begin now; a window may go over midnight."""
    found = WINDOW.fullmatch(when)
    if found is None:
        return True
    begins, ends = (datetime.time(int(found[at]), int(found[at + 1])) for at in (1, 3))
    return begins <= now < ends if begins < ends else now >= begins or now < ends


class Place:
    """Taken for one run at a time. Without PLACE there is nothing to take."""

    def __init__(self, redis: Redis, settings: TrainerSettings) -> None:
        self._redis, self._settings = redis, settings
        self._member = f"trainer-{secrets.token_hex(4)}"  # another trainer is another member
        self._stage: Stage = "asleep"

    @contextlib.contextmanager
    def taken(self, still: Callable[[], None], say: Callable[[str], None]) -> Iterator[None]:
        """Have it. `still()` is called again and again while it is waited for, and raises what ends the waiting."""
        if not self._settings.shared_place:
            yield
            return
        self._await_idle(still, say)
        say("waiting for the GPU: engines finish what they have, and sleep")
        self._stage = "asleep"
        over = threading.Event()
        keeping = threading.Thread(target=self._keep, args=(over,), daemon=True)
        keeping.start()  # by itself: whatever else is slow, it is not forgotten
        try:
            while not self._say():
                still()
                time.sleep(ASK_EVERY_S)
            self._stage = "awake"
            say("the engines sleep; training")
            yield
        finally:
            over.set()
            keeping.join()
            with contextlib.suppress(RedisError, OSError):  # else it is forgotten after a while
                self._redis.eval(*places.call(self._settings.shared_place, self._saying("asleep", wants=False)))

    def _keep(self, over: threading.Event) -> None:
        """Say how it is, until it is over."""
        while not over.wait(SAY_EVERY_S):
            self._say()

    def _await_idle(self, still: Callable[[], None], say: Callable[[str], None]) -> None:
        """With TRAIN_WHEN=idle: until nobody was served for IDLE_S."""
        if self._settings.train_when != "idle":
            return
        seen, since = self._served(), time.monotonic()
        told = False
        while True:
            now = self._served()
            if now is None or now != seen or now[0]:
                seen, since = now, time.monotonic()
            if time.monotonic() - since >= IDLE_S:
                return
            if not told:
                say(f"waiting until nobody was served for {IDLE_S:.0f} s (TRAIN_WHEN=idle)")
                told = True
            still()
            time.sleep(ASK_EVERY_S)

    def _served(self) -> tuple[int, int] | None:
        """(requests that run, tokens read) of all workers: the same twice, nobody is served. None: unknown."""
        try:
            names: list[Any] = sorted(self._redis.smembers(WORKERS))
            raws = self._redis.mget([worker_key(str(name)) for name in names]) if names else []
        except (RedisError, OSError):
            return None
        beats = [msgspec.json.decode(raw, type=Heartbeat) for raw in raws if raw]
        return sum(beat.interactive for beat in beats), sum(beat.prompt_tokens for beat in beats)

    def _say(self) -> bool:
        """Whether it is ours. While redis is away everything stays as it is."""
        try:
            saying = self._saying(self._stage, wants=True)
            reply: Any = self._redis.eval(*places.call(self._settings.shared_place, saying))
        except (RedisError, OSError) as error:
            logger.warning("whose turn it is cannot be asked", error=str(error) or type(error).__name__)
            return False
        return places.heard(reply).holds

    def _saying(self, stage: Stage, *, wants: bool) -> Saying:
        return Saying(self._member, "all", wants, stage, busy=stage == "awake")
