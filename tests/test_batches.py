"""What a batch line may be, what survives a crash, and how fast batches may go. No stack."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.files import new_id
from services.jobs import batch_input, tables
from services.jobs.batch import Batch
from services.jobs.batch_limit import GAP_S, MIN_SAMPLES, QUIET_S, REST_S, SHARED_START, BatchLimit
from services.jobs.batch_results import Result, Results
from services.jobs.leases import LeaseLost
from tests.jobs_service import Dead, Mortal, database

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

    def test_one_line_of_a_hundred_megabytes_is_named_and_not_read(self, tmp_path: Path) -> None:
        """One line of 9 MB cost 242 MB, and the loop stood still for half a second (B3)."""
        path = tmp_path / "in.jsonl"
        with open(path, "wb") as file:
            file.write(json.dumps(row("good")).encode() + b"\n" + b'{"custom_id":"' + b"x" * 100_000_000 + b'"}\n')
        tracemalloc.start()
        found = batch_input.check(path, CHAT, {"m"})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert [(p["line"], p["code"]) for p in found.problems] == [(2, "line_too_long")]
        assert peak < 20_000_000

    def test_a_mistake_is_shown_and_not_copied(self, tmp_path: Path) -> None:
        """A thousand mistakes of 200 kB each were kept in memory and in the database (B3)."""
        for field in ("method", "url", "custom_id"):
            _, problems, _ = check(tmp_path, row("good"), row(f"x{field}", **{field: "y" * 200_000}))
            assert problems
            assert len(json.dumps(problems)) < 600
        _, problems, _ = check(tmp_path, row("x", body={"model": "\ud800" * 100_000}))
        assert len(json.dumps(problems).encode()) < 2000

    def test_an_empty_file(self, tmp_path: Path) -> None:
        assert check(tmp_path)[1][0]["code"] == "empty_file"


class TestResults:
    """Rows of the database, each line once."""

    @pytest.fixture
    def batch(self) -> Batch:
        return Batch(id=new_id("batch"), owner="o", status="in_progress", endpoint=CHAT, input_file_id="f", completion_window="24h",
                     created_at=1, expires_at=2, results=new_id("file"), failures=new_id("file"))

    @pytest.fixture
    def kept(self, tmp_path: Path, batch: Batch) -> Iterator[Mortal]:
        made = database(tmp_path, Mortal)
        made.transact(lambda c: tables.add(c, tables.batches, batch, lease="t"))
        yield made
        made.close()

    def answer(self, line: int, ok: bool = True) -> Result:
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 2}}
        return Result.of(line, ok, {"custom_id": str(line), "response": {"status_code": 200 if ok else 400, "body": {"usage": usage} if ok else {}}})

    def find(self, kept: Mortal, batch: Batch) -> Batch:
        found = kept.transact(lambda c: tables.find(c, tables.batches, Batch, batch.id))
        assert found is not None
        return found

    def test_what_was_written_is_known_after_a_crash_and_counted_with_it(self, kept: Mortal, batch: Batch) -> None:
        first = Results(kept, batch, "t")
        for line in (1, 2, 3):
            first.add(self.answer(line))
        first.add(self.answer(4, ok=False))
        assert first.flush() == 4
        first.add(self.answer(5))  # never flushed: it is asked again
        again = Results(kept, self.find(kept, batch), "t")
        assert again.lines() == {1, 2, 3, 4}
        assert (again.completed, again.failed) == (3, 1)
        assert again.usage == {"input_tokens": 15, "output_tokens": 21, "cached_tokens": 6}
        assert (first.completed, first.failed, first.usage) == (again.completed, again.failed, again.usage)

    def test_a_full_disk_keeps_them_waiting_and_nothing_is_lost_or_doubled(self, kept: Mortal, batch: Batch) -> None:
        """192 of 200 paid answers were in the file, and 184 were counted (A3)."""
        results = Results(kept, batch, "t")
        for line in range(200):
            results.add(self.answer(line))
            if line % 8 == 0:
                kept.full = 1
                with pytest.raises(OSError, match="full"):
                    results.flush()
        assert results.flush() == 200
        assert (len(results.lines()), self.find(kept, batch).completed) == (200, 200)

    def test_a_commit_whose_answer_was_lost_is_not_made_twice(self, kept: Mortal, batch: Batch) -> None:
        first = Results(kept, batch, "t")
        first.add(self.answer(1))
        kept.fuse, kept.after = 0, True
        with pytest.raises(Dead):
            first.flush()
        kept.dead, kept.fuse = False, -1
        first.add(self.answer(2))
        assert first.flush() == 0, "line 1 is there already"
        assert first.flush() == 1
        assert (first.lines(), self.find(kept, batch).completed) == ({1, 2}, 2)

    def test_who_has_lost_the_lease_writes_nothing(self, kept: Mortal, batch: Batch) -> None:
        results = Results(kept, batch, "somebody else's")
        results.add(self.answer(1))
        with pytest.raises(LeaseLost):
            results.flush()
        assert (results.lines(), self.find(kept, batch).completed) == (set(), 0)

    def test_files_are_in_the_order_of_the_lines_and_whole(self, kept: Mortal, batch: Batch, tmp_path: Path) -> None:
        results = Results(kept, batch, "t")
        for line in range(1100, 0, -1):
            results.add(self.answer(line, ok=line % 2 == 0))
        results.flush()
        size = results.write_file(True, tmp_path / "good")
        rows = [json.loads(row) for row in (tmp_path / "good").read_text().splitlines()]
        assert [row["custom_id"] for row in rows] == [str(n) for n in range(2, 1101, 2)]
        assert size == (tmp_path / "good").stat().st_size
        assert Results(kept, batch, "t").write_file(False, tmp_path / "none") == 0

    def test_large_answers_are_never_all_in_memory(self, kept: Mortal, batch: Batch, tmp_path: Path) -> None:
        """500 rows were read at once: a container of 2 GB was killed again and again."""
        results = Results(kept, batch, "t")
        for line in range(150):
            results.add(Result.of(line, True, {"custom_id": str(line), "text": "x" * 1_000_000}))
            results.flush()
        assert results.waiting_bytes == 0
        tracemalloc.start()
        assert results.write_file(True, tmp_path / "good") > 150_000_000
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
        tracemalloc.stop()


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
