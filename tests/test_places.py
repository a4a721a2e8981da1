"""Whose turn it is, in a real redis: two engines on one card are never both told that they may be awake."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from redis import Redis

from common import places
from common.places import Saying, Turn
from services.local.state_server import find_redis
from services.trainer import place as trainers_place
from services.trainer.place import Place as TrainersPlace
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
        monkeypatch.setattr(places, "NEW_S", 0.0)

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


class TestTraining:
    """The trainer's side: it has the place while it trains, and whatever ends that gives it free."""

    @pytest.fixture
    def trainer(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> TrainersPlace:
        monkeypatch.setattr(trainers_place, "ASK_EVERY_S", 0.01)
        return TrainersPlace(place.redis, SimpleNamespace(shared_place=PLACE, train_when="now"))  # type: ignore[arg-type]

    def test_it_waits_until_the_engines_sleep_and_they_until_it_is_done(self, place: Place, trainer: TrainersPlace) -> None:
        place.say("engine", kind="always")
        looked: list[Turn] = []

        def still() -> None:
            looked.append(place.say("engine", kind="always", stage="awake", wants=len(looked) < 3))

        with trainer.taken(still, lambda _: None):
            assert [turn.asked for turn in looked] == [True, True, True, False]
            assert place.say("engine", kind="always") == Turn(False, False, 0, True)
        assert place.say("engine", kind="always").holds

    def test_it_is_kept_however_slow_the_rest_is(self, place: Place, trainer: TrainersPlace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(places, "FORGOTTEN_S", 0.2)
        monkeypatch.setattr(trainers_place, "SAY_EVERY_S", 0.02)
        with trainer.taken(lambda: None, lambda _: None):
            time.sleep(0.5)
            assert not place.say("engine", kind="always").holds
        assert place.say("engine", kind="always").holds

    def test_its_turn_is_kept_however_slow_the_jobs_service_is(
        self, place: Place, trainer: TrainersPlace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A lease that took ten seconds to keep lost the turn, and engines woke and slept in turns."""
        monkeypatch.setattr(places, "FORGOTTEN_S", 0.2)
        monkeypatch.setattr(trainers_place, "SAY_EVERY_S", 0.02)
        place.say("engine", kind="always", stage="awake")
        waited: list[bool] = []

        def still() -> None:
            time.sleep(0.5)
            waited.append(place.say("other", kind="always").taken)
            place.say("other", kind="always", wants=False)

        with trainer.taken(still, lambda _: None):
            assert waited == [True]

    def test_what_ends_the_waiting_or_the_run_gives_it_free(self, place: Place, trainer: TrainersPlace) -> None:
        place.say("engine", kind="always", stage="awake")

        def cancelled() -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError), trainer.taken(cancelled, lambda _: None):
            pass
        assert not place.say("engine", kind="always", stage="awake").asked
        place.say("engine", kind="always", wants=False)
        with pytest.raises(ZeroDivisionError), trainer.taken(cancelled, lambda _: None):
            raise ZeroDivisionError
        assert place.say("engine", kind="always").holds

    def test_idle_means_that_nobody_was_served_for_a_while(self, place: Place, trainer: TrainersPlace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trainers_place, "IDLE_S", 0.2)
        trainer._settings.train_when = "idle"  # type: ignore[misc]
        served = iter([(1, 5), (1, 5), (0, 9), (0, 9)])
        monkeypatch.setattr(trainer, "_served", lambda: next(served, (0, 9)))
        said: list[str] = []
        began = time.monotonic()
        with trainer.taken(lambda: None, said.append):
            assert time.monotonic() - began > 0.2
        assert "TRAIN_WHEN=idle" in said[0]

    def test_two_trainers_of_one_place_train_one_after_the_other(self, place: Place, trainer: TrainersPlace) -> None:
        other = TrainersPlace(place.redis, trainer._settings)
        asked = 0

        def still() -> None:
            nonlocal asked
            asked += 1
            if asked == 5:
                raise InterruptedError

        with trainer.taken(lambda: None, lambda _: None):
            with pytest.raises(InterruptedError), other.taken(still, lambda _: None):
                pytest.fail("both have it")
            assert not place.say("engine", kind="always").holds, "who gave up the waiting gave nothing free"
            place.say("engine", kind="always", wants=False)
        with other.taken(lambda: None, lambda _: None):
            assert asked == 5

    def test_without_a_place_nobody_is_asked(self, place: Place) -> None:
        alone = TrainersPlace(None, SimpleNamespace(shared_place="", train_when="idle"))  # type: ignore[arg-type]
        with alone.taken(lambda: None, print):
            pass


def test_a_place_that_redis_forgot_is_given_to_nobody_before_those_awake_have_spoken(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "NEW_S", 0.2)
    assert not place.say("b").holds, "somebody else may be awake"
    assert place.say("a", stage="awake").holds
    time.sleep(0.25)
    assert not place.say("b").holds
    place.say("a", wants=False)
    assert place.say("b").holds


def test_two_that_woke_beside_each_other_do_not_stay_so(place: Place) -> None:
    assert place.say("a").holds
    time.sleep(0.003)
    assert place.say("b", stage="awake").holds, "it says that it is awake, and redis cannot know better"
    assert (place.say("a", stage="awake").asked, place.say("b", stage="awake").asked) == (False, True)


def test_never_two(server: Redis, tmp_path: Path) -> None:
    class Engines(RuleBasedStateMachine):
        """Members that do what they are told, in any order."""

        def __init__(self) -> None:
            super().__init__()
            server.flushall()
            places.NEW_S = 0.0
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
