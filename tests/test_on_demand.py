"""Models that are started by the first request for them and take turns: real nginx, gateway, redis and agents."""

import concurrent.futures
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common import places
from common.places import Saying
from tests.harness import Stack, body, running, wait_for

ALL_AT_ONCE = 8


class Turning(Stack):
    """A stack with agents that share a place."""

    def add_agent(self, name: str, port: int, **settings: str) -> None:
        env = self.env("worker") | {
            "WORKER_NAME": name, "ENGINE_PORT": str(self.worker_ports[port]), "ADVERTISE_HOST": "127.0.0.1", "MODEL": "/nowhere",
            "SERVED_MODEL_NAME": name, "PLACE": "cpu", "ON_DEMAND": "true", "STALL_S": "60", "DRAIN_TIMEOUT_S": "20", **settings,
        }
        self.spawn(f"w-{name}", [sys.executable, "-m", "tests.fake_agent"], env)

    def states(self) -> dict[str, str]:
        redis = self.redis()
        beats = [httpx.Response(200, content=raw).json() for name in redis.smembers("workers") if (raw := redis.get(f"worker:{name}"))]
        return {beat["models"][0]["id"]: beat["state"] for beat in beats}

    def ask(self, model: str, script: str = "say 3", timeout_s: float = 60.0, **fields: object) -> httpx.Response:
        with self.client() as client:
            return client.post("/v1/chat/completions", json=body(script, model=model, **fields), timeout=timeout_s)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Turning]:
    with running(tmp_path_factory.mktemp("turns"), Turning) as found:
        assert isinstance(found, Turning)
        for port, name in enumerate(("one", "two")):
            found.add_agent(name, port)
        wait_for(lambda: found.states() == {"one": "asleep", "two": "asleep"}, "both asleep")
        yield found


def test_the_first_request_wakes_it_and_waits(stack: Turning) -> None:
    assert sorted(m["id"] for m in stack.client().get("/v1/models").json()["data"]) == ["one", "two"]
    began = time.monotonic()
    answer = stack.ask("one")
    assert answer.status_code == 200, answer.text
    assert "xxx" in answer.text
    assert time.monotonic() - began < 20
    assert stack.states() == {"one": "ready", "two": "asleep"}
    began = time.monotonic()
    assert stack.ask("one").status_code == 200
    assert time.monotonic() - began < 1, "it is awake"


def test_switches_fail_no_request(stack: Turning) -> None:
    """Several clients ask for both models at once: each waits for its model's turn."""
    with concurrent.futures.ThreadPoolExecutor(ALL_AT_ONCE) as pool:
        for _ in range(2):
            answers = list(pool.map(lambda n: stack.ask(("one", "two")[n % 2], "slow 0.1"), range(ALL_AT_ONCE)))
            assert [answer.status_code for answer in answers] == [200] * ALL_AT_ONCE, [a.text for a in answers]
    assert sorted(stack.states().values()) == ["asleep", "ready"]


def test_a_stream_is_not_cut_by_another_ones_turn(stack: Turning) -> None:
    assert stack.ask("one").status_code == 200
    with stack.client() as client, client.stream(
        "POST", "/v1/chat/completions", json=body("stream 600", model="one", stream=True), timeout=60
    ) as stream, concurrent.futures.ThreadPoolExecutor() as pool:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        other = pool.submit(stack.ask, "two")
        said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]"
        assert sum("w5" in line for line in said) > 10
        assert other.result().status_code == 200


def test_who_waits_is_seen_and_leaves_nothing_behind(stack: Turning) -> None:
    assert stack.ask("one").status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        stack.ask("two", timeout_s=0.3)
    wait_for(lambda: stack.redis().hgetall("wake:two") != {}, "wished")
    wait_for(lambda: stack.redis().exists("wake:two") == 0, "and forgotten", 15)


def test_while_a_training_has_the_place_it_is_said_at_once(stack: Turning) -> None:
    assert stack.ask("one").status_code == 200
    trainer = stack.redis("trainer")
    try:
        wait_for(lambda: trainer.eval(*places.call("cpu", Saying("t", "all", True)))[0] == 1, "the place", 20)
        wait_for(lambda: stack.states() == {"one": "asleep", "two": "asleep"}, "asleep")
        wait_for(lambda: stack.ask("one").status_code == 503, "refused")
        answer = stack.ask("one")
        assert answer.json()["error"]["code"] == "model_asleep"
        assert "training" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) > 0
    finally:
        trainer.eval(*places.call("cpu", Saying("t", "all", False)))
    wait_for(lambda: stack.ask("one").status_code == 200, "back", 30)


@pytest.mark.parametrize("when", ["asleep", "awake"])
def test_a_killed_agent_comes_back_and_its_place_is_free(stack: Turning, when: str) -> None:
    other, name = ("two", "one") if when == "awake" else ("one", "two")
    assert stack.ask("one").status_code == 200
    stack.kill(f"w-{name}", signal.SIGKILL)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waits = pool.submit(stack.ask, other)
        stack.add_agent(name, ("one", "two").index(name))
        assert waits.result().status_code == 200
    wait_for(lambda: stack.ask(name).status_code == 200, "answers again", 40)


def test_one_that_does_not_wake_in_time_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAKE_PATIENCE_S", "1")
    with running(tmp_path, Turning) as stack:
        assert isinstance(stack, Turning)
        stack.add_agent("never", 0, START_TIMEOUT_S="600", ENGINE_PORT=str(stack.worker_ports[1]))
        wait_for(lambda: stack.states() == {"never": "asleep"}, "asleep")
        stack.redis("trainer").eval(*places.call("cpu", Saying("t", "turn", True, "awake")))  # who never gives its place free
        began = time.monotonic()
        answer = stack.ask("never")
        assert 0.9 < time.monotonic() - began < 5
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_waking")
        assert "WAKE_PATIENCE_S" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) > 0
