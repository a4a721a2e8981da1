"""A path that waits for nothing itself: it yields what must be awaited, and goes on with what came of it.

Most requests need nothing awaited; their decision is there at once, without a task or a turn of the event loop. The
others are finished in a task. The path is written once for both, and tested without an event loop.
"""

from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[Awaitable[Any], Any, T]


class Waiting:
    """Steps that came to something that must be awaited first."""

    __slots__ = ("_awaitable", "_steps")

    def __init__(self, steps: Steps[Any], awaitable: Awaitable[Any]) -> None:
        self._steps, self._awaitable = steps, awaitable

    async def finish(self) -> Any:
        """Go on to the end; its result. Errors and cancellations reach the steps where they wait."""
        awaitable = self._awaitable
        while True:
            try:
                value = await awaitable
            except BaseException as error:
                go_on: Callable[[], Awaitable[Any]] = partial(self._steps.throw, error)
            else:
                go_on = partial(self._steps.send, value)
            try:
                awaitable = go_on()
            except StopIteration as end:
                return end.value


def start(steps: Steps[T]) -> T | Waiting:
    """Run steps as far as they come without waiting: the result, or what is left."""
    try:
        return Waiting(steps, next(steps))
    except StopIteration as end:
        result: T = end.value
        return result


async def run(steps: Steps[T]) -> T:
    """Run steps to their end."""
    begun = start(steps)
    if isinstance(begun, Waiting):
        result: T = await begun.finish()
        return result
    return begun
