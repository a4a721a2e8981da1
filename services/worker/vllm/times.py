"""Where a request's time went inside the engine: seconds in queue, prefill and decode.

vLLM tells its stat loggers (`stat_logger.py`) of every finished request, under the id its API server made from ours, in
the process where our middleware lives.
"""

from collections import OrderedDict

from common.records import Record

Parts = tuple[float, float, float]
MAX_KEPT = 4096
_ENGINE_IDS = {"chat": "chatcmpl-{}", "completions": "cmpl-{}-0"}
"""How vLLM 0.32 names a request after its X-Request-Id; of several choices the last counts."""
_finished: OrderedDict[str, Parts] = OrderedDict()


def keep(engine_id: str, parts: Parts) -> None:
    """Note a finished request until the middleware asks for it; the oldest beyond MAX_KEPT are forgotten."""
    _finished[engine_id] = parts
    while len(_finished) > MAX_KEPT:
        _finished.popitem(last=False)


def take(record: Record) -> Parts | None:
    """The times of a request; None when the engine did not finish it, or names it otherwise."""
    name = _ENGINE_IDS.get(record.route)
    return _finished.pop(name.format(record.request_id), None) if name else None
