"""Keeps everybody off a server that does not answer."""

import time
from collections.abc import Callable


class Breaker:
    """Open for FIRST_S after a failure, then twice as long each time, up to LONGEST_S; a success closes it."""

    FIRST_S = 1.0
    LONGEST_S = 30.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause_s = 0.0
        self._until = float("-inf")

    @property
    def open(self) -> bool:
        """True: do not try."""
        return self._clock() < self._until

    def failed(self) -> bool:
        """Note a failure. True when it is the first since things went well."""
        first = self._pause_s == 0.0
        if not self.open:
            self._pause_s = min(self.LONGEST_S, self._pause_s * 2 or self.FIRST_S)
            self._until = self._clock() + self._pause_s
        return first

    def worked(self) -> bool:
        """Note a success. True when it is the first since a failure."""
        back = self._pause_s > 0.0 and not self.open
        if back:
            self._pause_s = 0.0
        return back
