"""What a batch line may be, what survives a crash, and how fast batches may go. No stack."""

import json
from pathlib import Path

import pytest

from services.jobs import batch_input
from services.jobs.batch_limit import GAP_S, MIN_SAMPLES, QUIET_S, REST_S, SHARED_START, BatchLimit
from services.jobs.batch_results import Result, Results

CHAT = "/v1/chat/completions"


def row(name: str, **fields: object) -> dict:
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": {"model": "m", "messages": []}, **fields}


def check(tmp_path: Path, *rows: object) -> tuple:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return batch_input.check(path, CHAT, {"m", "ft:m"})


class TestLines:
    def test_a_model_that_is_away_later_drops_no_line(self, tmp_path: Path) -> None:
        """After a restart lines were judged by the models served then: completed, with lines missing (A1)."""
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(row(f"r{i}", body={"model": m})) + "\n" for i, m in enumerate("ab")))
        assert len(batch_input.check(path, CHAT, {"a"})[0]) == 1
        found, problems, _ = batch_input.check(path, CHAT, None)
        assert (len(found), problems) == (2, [])

    def test_good_lines_are_found_again(self, tmp_path: Path) -> None:
        rows = [row(f"r{i}", body={"model": "m", "messages": [{"role": "user", "content": "ü" * i}]}) for i in range(20)]
        found, problems, used = check(tmp_path, *rows[:10], b"", *rows[10:])
        assert (problems, used) == ([], {"m"})
        assert [line.custom_id for line in found] == [f"r{i}" for i in range(20)]
        for line, sent in zip(found, rows, strict=True):
            assert json.loads(batch_input.body(tmp_path / "in.jsonl", line)) == sent["body"]

    @pytest.mark.parametrize(("bad", "code"), [
        (b"{", "invalid_json_line"), (b"[]", "invalid_json_line"),
        (row(""), "missing_required_parameter"), ({k: v for k, v in row("x").items() if k != "custom_id"}, "missing_required_parameter"),
        (row("x", method="GET"), "invalid_method"), (row("x", url="/v1/completions"), "mismatched_url"),
        (row("x", body="hi"), "missing_required_parameter"), (row("x", body={"model": "gpt-4"}), "model_not_found"),
        (row("x", body={"model": "m", "stream": True}), "invalid_parameter"), (row("good"), "duplicate_custom_id"),
    ])
    def test_each_mistake_is_named(self, tmp_path: Path, bad: object, code: str) -> None:
        _, problems, _ = check(tmp_path, row("good"), bad)
        assert [(p["line"], p["code"]) for p in problems] == [(2, code)]

    def test_an_empty_file(self, tmp_path: Path) -> None:
        assert check(tmp_path)[1][0]["code"] == "empty_file"


class TestResults:
    def answer(self, name: str, ok: bool = True) -> Result:
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 2}}
        return Result(ok, {"custom_id": name, "response": {"status_code": 200 if ok else 400, "body": {"usage": usage} if ok else {}}})

    def test_what_is_on_disk_is_known_after_a_crash(self, tmp_path: Path) -> None:
        first = Results(tmp_path / "good", tmp_path / "bad")
        first.recover()
        for name in "abc":
            first.add(self.answer(name))
        first.add(self.answer("d", ok=False))
        assert first.flush() == 4
        first.add(self.answer("lost"))  # never flushed: it is asked again
        again = Results(tmp_path / "good", tmp_path / "bad")
        again.recover()
        assert again.ids == {"a", "b", "c", "d"}
        assert (again.completed, again.failed) == (3, 1)
        assert again.usage == {"input_tokens": 15, "output_tokens": 21, "cached_tokens": 6}
        assert (first.completed, first.failed, first.usage) == (again.completed, again.failed, again.usage)

    @pytest.mark.parametrize("cut", [1, 10, 40])
    def test_a_torn_last_line_is_cut_off_and_asked_again(self, tmp_path: Path, cut: int) -> None:
        results = Results(tmp_path / "good", tmp_path / "bad")
        for name in ("a", "b"):
            results.add(self.answer(name))
        results.flush()
        whole = (tmp_path / "good").read_bytes()
        (tmp_path / "good").write_bytes(whole[:-cut])
        again = Results(tmp_path / "good", tmp_path / "bad")
        again.recover()
        assert again.ids == {"a"}
        again.add(self.answer("b"))
        again.flush()
        assert (tmp_path / "good").read_bytes() == whole


class TestLimit:
    def pace(self) -> tuple[BatchLimit, list[float]]:
        now = [100.0]
        pace = BatchLimit(clock=lambda: now[0])
        pace.learn([0.1] * MIN_SAMPLES)
        return pace, now

    def idle(self, pace: BatchLimit, now: list[float], looks: int) -> None:
        for _ in range(looks):
            now[0] += 0.1
            pace.look(slots=64, interactive=0, ttfts_s=[])

    def test_idle_engines_are_used_but_for_a_reserve(self) -> None:
        pace, now = self.pace()
        self.idle(pace, now, 100)
        assert pace.limit == 48

    def test_no_engine_no_room(self) -> None:
        pace, _ = self.pace()
        pace.look(slots=0, interactive=0, ttfts_s=[])
        assert not pace.room(1, 0)

    def test_somebody_comes_and_it_is_small_at_once_until_they_have_been_gone_for_a_while(self) -> None:
        pace, now = self.pace()
        self.idle(pace, now, 100)
        pace.look(slots=64, interactive=1, ttfts_s=[])
        assert pace.limit == SHARED_START
        self.idle(pace, now, int(QUIET_S * 10) - 1)
        assert pace.limit == SHARED_START
        self.idle(pace, now, 100)
        assert pace.limit == 48

    def test_slower_answers_halve_it_once_in_a_while_down_to_moments_without_anybody(self) -> None:
        pace, now = self.pace()
        pace.shared = 8.0
        pace.look(slots=64, interactive=1, ttfts_s=[0.2, 0.2])
        assert pace.limit == 4
        pace.look(slots=64, interactive=1, ttfts_s=[0.2])
        assert pace.limit == 4
        for _ in range(3):
            now[0] += REST_S + 0.1
            pace.look(slots=64, interactive=1, ttfts_s=[0.2])
        assert pace.limit == 0.5
        assert not pace.room(0, 1)
        assert not pace.room(0, 0), "somebody was here a moment ago"
        now[0] += GAP_S
        assert pace.room(0, 0)
        assert not pace.room(1, 0)

    def test_answers_as_fast_as_ever_let_it_grow_slowly(self) -> None:
        pace, now = self.pace()
        pace.shared = 1.0
        for _ in range(50):
            now[0] += 0.1
            pace.look(slots=64, interactive=1, ttfts_s=[0.1])
        assert pace.limit == pytest.approx(2.0)
