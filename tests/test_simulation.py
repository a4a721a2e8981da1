"""The simulation of a fleet: what can be worked out by hand comes out, nothing is lost, and the policies differ as they should."""

import pytest

from bench import traces
from bench.simulate import POLICIES, Fleet, Speed, run
from bench.traces import Session, Shape, Turn

SPEED = Speed(base_s=0.01, decode_s=0.001, prefill_s=0.001, attention_s=0.0, remote_s=0.0001, step_tokens=500, slots=4, block_tokens=50, blocks=1000)
WORDS = traces.WORDS * 20


def text(count: int, begin: int = 0) -> str:
    return " ".join(WORDS[begin : begin + count])


def conversation(at_s: float = 0.0, *turns: Turn, system: str = text(100)) -> Session:
    return Session(at_s, system, turns or (Turn(text(100, 7), 10, 0.0), Turn(text(30, 3), 10, 5.0)))


def busy(workers: int) -> list[Session]:
    shape = Shape(applications=10 * workers, system_tokens=200, turns=4, question_tokens=40, answer_tokens=30, pause_s=2)
    return traces.sessions(shape, 0.6 * workers, 40, seed=3)


class TestByHand:
    def test_one_request(self) -> None:
        """A prompt of 200 tokens is read in one step, whose end is the first token."""
        out = run([conversation(0.0, Turn(text(100, 7), 10, 0.0))], Fleet(1), SPEED, POLICIES["prefix"])
        assert out.ttft_s == (pytest.approx(0.01 + 200 * 0.001),)
        assert (out.hit_rate, out.failed) == (0.0, 0)
        assert out.busy == pytest.approx(1.0), "it computed from the first moment to the last"

    def test_a_long_prompt_is_read_in_chunks(self) -> None:
        out = run([conversation(0.0, Turn(text(500), 1, 0.0), system=text(600))], Fleet(1), SPEED, POLICIES["random"])
        assert out.ttft_s == (pytest.approx(3 * 0.01 + 1100 * 0.001),)

    def test_the_second_turn_finds_the_first_in_the_cache(self) -> None:
        """200 tokens and an answer of 10: four whole blocks of 50; the second prompt has 240."""
        out = run([conversation()], Fleet(1), SPEED, POLICIES["prefix"])
        assert out.ttft_s[1] == pytest.approx(0.01 + 40 * 0.001)
        assert out.hit_rate == pytest.approx(200 / 440)

    def test_from_the_tier_it_takes_as_long_as_that(self) -> None:
        """In turn, so the second turn comes to the other worker."""
        out = run([conversation()], Fleet(2), SPEED, POLICIES["round robin"])
        assert out.ttft_s[1] == pytest.approx(0.01 + 40 * 0.001 + 200 * 0.0001)
        assert run([conversation()], Fleet(2, tier=False), SPEED, POLICIES["round robin"]).hit_rate == 0.0

    def test_more_than_there_are_slots_wait(self) -> None:
        at_once = [conversation(0.0, Turn(text(50, n), 20, 0.0), system=text(50, 60 + n)) for n in range(5)]
        out = run(at_once, Fleet(1), SPEED, POLICIES["prefix"])
        assert sorted(out.ttft_s)[4] > sorted(out.ttft_s)[3] + 19 * 0.01


class TestNothingIsLost:
    @pytest.mark.parametrize("policy", POLICIES)
    def test_every_turn_is_answered_and_the_same_again(self, policy: str) -> None:
        trace = busy(6)
        fleet = Fleet(6, 3, slow=0.2)
        out = run(trace, fleet, SPEED, POLICIES[policy], seed=5)
        assert len(out.ttft_s) == sum(len(session.turns) for session in trace)
        assert out.failed == 0
        assert out == run(trace, fleet, SPEED, POLICIES[policy], seed=5)

    def test_what_died_with_a_worker_fails_and_the_rest_goes_on(self) -> None:
        trace = busy(6)
        out = run(trace, Fleet(6, 2, deaths=((10.0, 0), (20.0, 4))), SPEED, POLICIES["prefix"])
        assert 0 < out.failed < 12, "those that were streaming"
        answered = sum(len(session.turns) for session in trace)
        assert answered - len(out.ttft_s) < 12 * 6

    def test_a_fleet_that_is_gone(self) -> None:
        out = run([conversation(5.0), conversation(0.0)], Fleet(2, deaths=((1.0, 0), (1.0, 1), )), SPEED, POLICIES["prefix"])
        assert out.failed == 2


class TestPolicies:
    def test_the_prefix_filter_is_worth_it_without_a_tier(self) -> None:
        trace = busy(20)
        of = {name: run(trace, Fleet(20, tier=False), SPEED, policy) for name, policy in POLICIES.items()}
        assert of["prefix"].hit_rate > of["least in flight"].hit_rate + 0.2
        assert of["prefix"].p95_s < of["least in flight"].p95_s
        assert of["prefix"].hottest < of["consistent hashing"].hottest

    def test_gateways_that_do_not_hear_of_each_other_hit_less(self) -> None:
        trace = busy(20)
        spread = run(trace, Fleet(20, 4, tier=False), SPEED, POLICIES["prefix"])
        kept = run(trace, Fleet(20, 4, by_session=True, tier=False), SPEED, POLICIES["prefix"])
        assert kept.hit_rate > spread.hit_rate + 0.1


class TestTraces:
    def test_the_same_seed_the_same_trace(self) -> None:
        assert busy(3) == busy(3)

    def test_means_and_bursts(self) -> None:
        trace = traces.sessions(Shape(burst=5.0), 2.0, 600, seed=1)
        in_bursts = sum(int(session.at_s / 15) % 4 == 3 for session in trace)
        assert 0.55 < in_bursts / len(trace) < 0.7, "a quarter of the time has five of eight"
        assert 3 < sum(len(session.turns) for session in trace) / len(trace) < 5
        assert sum(turn.answer_tokens for session in trace for turn in session.turns) > 0
