"""Whose turn it is, in a real redis: two engines on one card are never both told that they may be awake."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from redis import Redis

from common import places
from common.places import Saying, Turn
from services.local.state_server import find_redis
from tests.harness import wait_for

PLACE = "gpu-0"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    socket = tmp_path_factory.mktemp("places") / "redis.sock"
    process = subprocess.Popen([find_redis(), "--port", "0", "--unixsocket", str(socket), "--save", ""], stdout=subprocess.DEVNULL)
    wait_for(socket.exists, "a redis")
    yield Redis(unix_socket_path=str(socket))
    process.terminate()
    process.wait()


class Place:
    """The members of one place."""

    def __init__(self, redis: Redis, monkeypatch: pytest.MonkeyPatch, least_awake_s: float = 0.0) -> None:
        redis.flushall()
        self.redis = redis
        monkeypatch.setattr(places, "LEAST_AWAKE_S", least_awake_s)

    def say(self, member: str, *, kind: str = "turn", wants: bool = True, **more: object) -> Turn:
        return places.heard(self.redis.eval(*places.call(PLACE, Saying(member, kind, wants, **more))))  # type: ignore[arg-type]


@pytest.fixture
def place(server: Redis, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(server, monkeypatch)


def test_the_first_wakes_the_second_waits_until_it_sleeps(place: Place) -> None:
    assert place.say("a") == Turn(True, False, 0, False)
    assert place.say("b") == Turn(False, False, 0, False)
    assert place.say("a", stage="awake") == Turn(True, True, 0, False), "asked to sleep"
    assert not place.say("b").holds, "it still has its memory"
    assert not place.say("a", wants=False).holds
    assert place.say("b").holds


def test_who_waits_longest_comes_first(place: Place) -> None:
    place.say("a")
    for name in ("c", "b"):
        place.say(name)
        time.sleep(0.003)
    assert (place.say("c").ahead, place.say("b").ahead) == (0, 1)
    place.say("a", wants=False)
    assert not place.say("b").holds, "c waits longer"
    assert place.say("c").holds


def test_the_idle_one_that_was_used_longest_ago_goes(place: Place) -> None:
    how = {"a": {"busy": True}, "b": {"idle_s": 5.0}, "c": {"idle_s": 9.0}}

    def asked() -> list[bool]:
        return [place.say(name, stage="awake", at_once=3, **how[name]).asked for name in "abc"]

    assert [place.say(name, at_once=3).holds for name in "abc"] == [True] * 3
    assert asked() == [False] * 3
    for comes, leaves in (("d", [False, False, True]), ("e", [False, True, True]), ("f", [True] * 3)):
        place.say(comes, at_once=3)
        assert asked() == leaves, "the busy one last"


def test_none_is_asked_before_its_time(server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which begins when it is awake: waking takes longer than that."""
    place = Place(server, monkeypatch, least_awake_s=0.2)
    place.say("a")
    for _ in range(30):
        time.sleep(0.01)
        place.say("b")
        assert not place.say("a", stage="waking").asked
    place.say("b")
    assert not place.say("a", stage="awake").asked
    wait_for(lambda: place.say("b") and place.say("a", stage="awake").asked, "asked", 2)


def test_a_training_has_the_place_for_itself(place: Place) -> None:
    place.say("always", kind="always")
    place.say("a")
    assert place.say("always", kind="always", stage="awake").holds
    assert place.say("a", stage="awake").holds
    train = place.say("trainer", kind="all")
    assert not train.holds
    for name, kind in (("always", "always"), ("a", "turn")):
        assert place.say(name, kind=kind, stage="awake").asked
        place.say(name, kind=kind, wants=False)
    assert place.say("trainer", kind="all").holds
    assert place.say("always", kind="always") == Turn(False, False, 0, True)
    assert not place.say("b").holds
    place.say("trainer", kind="all", wants=False)
    assert place.say("always", kind="always").holds
    assert place.say("b").holds


def test_two_trainings_one_after_the_other(place: Place) -> None:
    assert place.say("one", kind="all").holds
    assert not place.say("two", kind="all").holds
    assert not place.say("one", kind="all", stage="awake").asked, "a training is not interrupted"
    place.say("one", kind="all", wants=False)
    assert place.say("two", kind="all").holds


def test_whoever_falls_silent_is_forgotten(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "FORGOTTEN_S", 0.1)
    place.say("a")
    time.sleep(0.15)
    assert place.say("b").holds
    assert place.redis.pttl("place:gpu-0") > 0, "and leaves nothing behind"


def test_an_engine_that_is_awake_keeps_its_place_when_redis_forgot(place: Place) -> None:
    assert place.say("a", stage="awake").holds
    assert not place.say("b").holds


def test_never_two(server: Redis, tmp_path: Path) -> None:
    class Engines(RuleBasedStateMachine):
        """Members that do what they are told, in any order."""

        def __init__(self) -> None:
            super().__init__()
            server.flushall()
            self.awake: dict[str, str] = {}

        @rule(name=st.sampled_from("abcd"), wants=st.booleans(), busy=st.booleans(), obeys=st.booleans())
        def engine(self, name: str, wants: bool, busy: bool, obeys: bool) -> None:
            kind = "always" if name == "a" else "turn"
            awake = name in self.awake
            heard = places.heard(server.eval(*places.call(PLACE, Saying(name, kind, wants or awake, "awake" if awake else "asleep", busy))))  # type: ignore[arg-type]
            if heard.asked and obeys and awake:
                del self.awake[name]
                server.eval(*places.call(PLACE, Saying(name, kind, False)))
            elif heard.holds:
                self.awake[name] = kind

        @rule(wants=st.booleans())
        def training(self, wants: bool) -> None:
            heard = places.heard(server.eval(*places.call(PLACE, Saying("trainer", "all", wants, "awake" if "trainer" in self.awake else "asleep"))))  # type: ignore[arg-type]
            if heard.holds:
                self.awake["trainer"] = "all"
            else:
                self.awake.pop("trainer", None)

        @invariant()
        def fits(self) -> None:
            assert list(self.awake.values()).count("turn") <= 1
            assert "trainer" not in self.awake or len(self.awake) == 1

    Engines.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    Engines.TestCase().runTest()
