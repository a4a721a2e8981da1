"""Engines that share a place, a GPU or the CPU, and take turns there; a training that needs the whole place for itself.

Every member says once a second how it is, and hears whether it may be awake or is asked to sleep (the script
TURN decides, in one step). A member that falls silent is forgotten: its engine died with it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from common.redis.names import place_key
from common.redis.scripts import TURN

Kind = Literal["turn", "always", "all"]
Stage = Literal["asleep", "waking", "awake"]
LEAST_AWAKE_S = 10.0
"""An engine that woke stays awake so long at least, so that two models asked in turns do not only wake and sleep."""
FORGOTTEN_S = 10.0
NEW_S = 2.5
"""A place of which redis knows nothing is given to nobody for so long: whoever is awake has spoken by then."""


class Turn(NamedTuple):
    """What a member hears."""

    holds: bool
    """It may be awake."""
    asked: bool
    """It is to sleep: somebody else wants its place."""
    ahead: int
    """Members that get their turn before it."""
    taken: bool
    """A training has or wants the whole place."""


class Saying(NamedTuple):
    """What a member says."""

    member: str
    kind: Kind
    wants: bool
    stage: Stage = "asleep"
    busy: bool = False
    idle_s: float = 0.0
    at_once: int = 1


def call(place: str, said: Saying) -> tuple[str, int, str, *tuple[str, ...]]:
    """The arguments of `redis.eval`."""
    arguments = (
        said.member, said.kind, str(int(said.wants)), said.stage, str(int(said.busy)), str(int(said.idle_s * 1000)),
        str(said.at_once), str(int(LEAST_AWAKE_S * 1000)), str(int(FORGOTTEN_S * 1000)), str(int(NEW_S * 1000)),
    )
    return (TURN, 1, place_key(place), *arguments)


def heard(reply: Sequence[int]) -> Turn:
    """What the script's answer means."""
    holds, asked, ahead, taken = map(int, reply)
    return Turn(bool(holds), bool(asked), ahead, bool(taken))
