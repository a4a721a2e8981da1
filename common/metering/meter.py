"""Where a request is begun and ended: load, record, metrics and log line, all in one place, each once."""

import contextlib
from collections.abc import Callable, Iterator

from common import logs
from common.metering.metrics import RequestMetrics
from common.recorder import Recorder
from common.records import Record

Times = Callable[[Record], tuple[float, float, float] | None]
"""The engine's seconds in queue, prefill and decode of a request that it finished."""


class Meter:
    """Where records go: redis, the log, the metrics. One per process.

    What is begun is ended once, whoever ends it: a second end, or one without a beginning, does nothing.
    """

    def __init__(
        self, recorder: Recorder, metrics: RequestMetrics, base_models: Callable[[], frozenset[str]],
        times: Times = lambda _: None,
    ) -> None:
        self._recorder = recorder
        self._times = times
        self._metrics = metrics
        self._base_models = base_models
        self._open: set[int] = set()
        self.reading = 0
        """Requests that have ended, and whose clients have not read everything yet."""
        self.interactive = 0
        """Requests here now that are no batch's."""

    @property
    def in_flight(self) -> int:
        """Requests here now."""
        return len(self._open)

    @contextlib.contextmanager
    def unread(self) -> Iterator[None]:
        """A request that has ended, and whose client has not read everything yet: its engine must not go."""
        self.reading += 1
        try:
            yield
        finally:
            self.reading -= 1

    def begin(self, record: Record) -> None:
        """A request arrived."""
        self._open.add(id(record))
        self.interactive += not record.batch
        if record.model not in self._base_models():
            record.adapter = record.model
        self._recorder.begin(record)

    def end(self, record: Record) -> None:
        """It ended: one stream entry, one observation, one log line."""
        if id(record) not in self._open:
            return
        self._open.remove(id(record))
        self.interactive -= not record.batch
        if (times := self._times(record)) is not None:
            record.queue_s, record.prefill_s, record.decode_s = (round(s, 6) for s in times)
        self._recorder.end(record)
        self._metrics.observe(record)
        self._metrics.dropped.set(self._recorder.dropped)
        good = record.outcome in ("ok", "cancelled", "client_error")
        logs.requests.write("info" if good else "warning", record)
