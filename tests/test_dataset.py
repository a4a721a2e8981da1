"""What a training file may contain, how a row is rendered, and how a run is planned. With the bundled model's tokenizer."""

import io
import itertools
import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import dataset
from common.adapters import Adapter, model_name, read_registry
from common.files import is_id, new_id
from services.jobs import check
from services.jobs.files import clean_name, page
from services.local.model import NAME, unpack
from services.local.plan import ROOT
from services.trainer import render
from services.trainer.plan import Plan, resolve
from services.trainer.run import split
from services.worker.vllm import punica

USER = {"role": "user", "content": "What is a KV cache?"}
SAID = {"role": "assistant", "content": "Keys and values of earlier tokens."}
GOOD = {"messages": [USER, SAID]}
EXAMPLES = ROOT / "examples"


def read(*rows: object, min_examples: int = 1) -> dataset.Dataset:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return dataset.read(lines, min_examples=min_examples)


class TestDataset:
    @pytest.mark.parametrize("row", [
        GOOD,
        {"prompt": "a", "completion": "b"},
        {"question": "a", "answer": "b"},
        {"messages": [{"role": "system", "content": "Be brief."}, USER, {**SAID, "weight": 0}, USER, {**SAID, "weight": 1}]},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {
            "name": "f", "arguments": "{}"}}]}, {"role": "tool", "tool_call_id": "1", "content": "3"}, SAID], "tools": []},
    ])
    def test_good_rows(self, row: dict) -> None:
        found = read(row)
        assert found.problems == []
        assert len(found.examples) == 1

    @pytest.mark.parametrize(("row", "code", "path"), [
        (b"{oops", "invalid_json", ""),
        (b"\xff\xfe{}", "not_utf8", ""),
        (b'[{"messages": []}]', "not_jsonl", ""),
        (b"[", "not_jsonl", ""),
        ("text", "data_type", ""),
        (7, "data_type", ""),
        ({}, "missing_messages_list", "messages"),
        ({"messages": []}, "missing_messages_list", "messages"),
        ({"messages": {"role": "user"}}, "missing_messages_list", "messages"),
        ({**GOOD, "extra": 1}, "unrecognized_key", "extra"),
        ({"messages": ["hi", SAID]}, "data_type", "messages[0]"),
        ({"messages": [{"content": "x"}, SAID]}, "message_missing_key", "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}, SAID]}, "unrecognized_role", "messages[0].role"),
        ({"messages": [{"role": "user"}, SAID]}, "missing_content", "messages[0].content"),
        ({"messages": [{"role": "user", "content": ""}, SAID]}, "missing_content", "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}, SAID]}, "missing_content", "messages[0].content"),
        ({"messages": [{**USER, "weight": 1}, SAID]}, "weight_not_assistant", "messages[0].weight"),
        ({"messages": [USER, {**SAID, "weight": 2}]}, "invalid_weight", "messages[1].weight"),
        ({"messages": [USER, {**SAID, "weight": True}]}, "invalid_weight", "messages[1].weight"),
        ({"messages": [{**USER, "colour": 1}, SAID]}, "message_unrecognized_key", "messages[0].colour"),
        *(({"messages": [USER, {"role": "assistant", "tool_calls": [{"type": "function", "function": bad}]}]}, "invalid_tool_call", "messages[1].tool_calls[0]")
          for bad in ("f", {}, {"name": "f", "arguments": "{"}, {"name": "f", "arguments": '"Paris"'}, {"name": "f", "arguments": [1]})),
        ({"messages": [USER]}, "example_missing_assistant_message", "messages"),
        ({"messages": [USER, {**SAID, "weight": 0}]}, "nothing_learnt", "messages"),
        ({"messages": [SAID, USER]}, "assistant_first", "messages[0].role"),
        ({"prompt": "a"}, "missing_content", "completion"),
        ({"prompt": "a", "completion": "  "}, "missing_content", "completion"),
        ({"question": "a", "answer": ["b"]}, "missing_content", "answer"),
        ({"question": "a", "answer": "b", "source": "c"}, "unrecognized_key", "source"),
    ])
    def test_each_mistake_is_named(self, row: object, code: str, path: str) -> None:
        found = read(row)
        assert found.examples == []
        assert [(p.line, p.code, p.path) for p in found.problems] == [(1, code, path)]
        assert found.problems[0].message

    def test_every_bad_line_is_named_and_good_ones_are_counted(self) -> None:
        rows = [GOOD if i % 3 else {"messages": [{"role": "robot", "content": ""}]} for i in range(300)]
        found = read(*rows)
        assert sorted({p.line for p in found.problems}) == list(range(1, 301, 3))
        assert {p.code for p in found.problems} == {"unrecognized_role", "missing_content"}
        assert len(found.examples) == 200
        text = dataset.summary(found.problems)
        assert text.startswith("200 problems (100 × ")
        assert "line 1, messages[0].role: 'robot'" in text

    def test_the_file_as_a_whole(self) -> None:
        assert [p.code for p in read(min_examples=10).problems] == ["too_few_examples"]
        assert [p.code for p in read(*[GOOD] * 9, b"", min_examples=10).problems] == ["too_few_examples"]
        assert read(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()).problems == []  # saved by Windows' editor

    def test_duplicates_and_overlap(self) -> None:
        other = {"messages": [USER, {**SAID, "content": "Something else."}]}
        training = read(GOOD, other, {"messages": [dict(reversed(USER.items())), {**SAID, "weight": 1}]})
        assert training.duplicates == [(3, 1)]
        assert dataset.overlap(training, read(other, {"question": "q", "answer": "a"})) == [(1, 2)]

    @given(st.lists(st.binary(max_size=60) | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "weight", "prompt", "completion", "tool_calls", "tools", "x"]), inner, max_size=4),
        max_leaves=8).map(lambda v: json.dumps(v).encode()), max_size=4))
    def test_any_line_is_an_example_or_a_problem(self, lines: list[bytes]) -> None:
        found = dataset.read(lines, min_examples=0)
        named = {p.line for p in found.problems}
        kept = {e.line for e in found.examples}
        assert not named & kept
        assert named | kept == {i for i, line in enumerate(lines, 1) if line.strip()}

    def test_a_mistake_is_shown_and_not_copied(self) -> None:
        """Keys of a megabyte stood in a thousand events; one that no UTF-8 can say made every list of jobs a 500."""
        for row in ({**GOOD, "k" * 500_000: 1}, {"messages": [{**USER, "\ud800" * 1000: 1}, SAID]}, {"messages": [{"role": "r" * 500_000}]},
                    {"messages": [USER, {**SAID, "weight": "w" * 500_000}]}, {"question": "q", "answer": "a", "z" * 500_000: 1}):
            found = read(row)
            assert found.problems
            assert len("".join(map(str, found.problems)).encode()) < 3000

    def test_a_file_of_nothing_but_mistakes_is_not_kept_in_memory(self) -> None:
        """1.5 MB of `{}` cost half a gigabyte (B3)."""
        found = dataset.read(itertools.repeat(b"{}\n"))
        assert len(found.problems) == dataset.MAX_PROBLEMS + 1
        assert (found.problems[-1].line, found.problems[-1].code) == (dataset.MAX_PROBLEMS, "too_many_problems")

    def test_of_a_line_without_end_only_the_beginning_is_read(self) -> None:
        file = io.BytesIO(json.dumps(GOOD).encode() + b"\n" + b"x" * 3 * dataset.MAX_LINE_BYTES + b"\n{}\n")
        found = dataset.read(dataset.open_lines(file))
        assert [(p.line, p.code) for p in found.problems][:1] == [(2, "line_too_long")]
        assert file.tell() == len(json.dumps(GOOD)) + 1 + dataset.MAX_LINE_BYTES + 1

    def test_the_same_row_again_and_again_is_one_row(self) -> None:
        """A split of them left no validation rows, and training ended in a KeyError (D3)."""
        assert [p.code for p in read(*[GOOD] * 12, min_examples=10).problems] == ["too_few_examples"]

    def test_the_check_as_a_process_says(self, tmp_path: Path) -> None:
        bad, good = tmp_path / "bad", tmp_path / "good"
        bad.write_bytes(b"{}\n" + json.dumps(GOOD).encode())
        rows = [{"question": f"q{i % 12}", "answer": "a"} for i in range(14)]
        good.write_text("\n".join(map(json.dumps, rows)))
        report = check.check(str(bad), None)
        assert [(p["param"], p["line"], p["code"]) for p in report["problems"]] == [
            ("training_file", 1, "missing_messages_list"), ("training_file", 0, "too_few_examples")]
        report = check.check(str(good), str(good))
        assert report["problems"] == []
        assert len(report["warnings"]) == 2  # repeated rows; validation rows that are training rows

    def test_the_example_data_is_clean(self) -> None:
        with open(EXAMPLES / "owngpt-qa.jsonl", "rb") as lines:
            training = dataset.read(lines)
        assert training.problems == []
        assert training.duplicates == []
        assert len(training.examples) == 300


@pytest.fixture(scope="module")
def tokenizer() -> object:
    from transformers import AutoTokenizer

    folder = ROOT / ".state/models" / NAME
    unpack(folder)
    return AutoTokenizer.from_pretrained(folder)


class TestRender:
    def test_the_mask_token_by_token(self, tokenizer: object) -> None:
        example = read({"messages": [USER, SAID, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No more."}]}).examples[0]
        one = render.encode(example, tokenizer)
        assert len(one.input_ids) == len(one.labels)
        text = tokenizer.decode(one.input_ids)
        assert text.count("<|im_start|>assistant\n") == 2
        learnt = [i for i, label in enumerate(one.labels) if label != render.IGNORED]
        assert all(one.labels[i] == one.input_ids[i] for i in learnt)
        assert tokenizer.decode([one.input_ids[i] for i in learnt]) == (
            "Keys and values of earlier tokens.<|im_end|>No more.<|im_end|>")

    def test_weight_0_is_read_but_not_learnt(self, tokenizer: object) -> None:
        example = read({"messages": [USER, {**SAID, "weight": 0}, USER, {"role": "assistant", "content": "Yes."}]}).examples[0]
        one = render.encode(example, tokenizer)
        assert tokenizer.decode([label for label in one.labels if label != render.IGNORED]) == "Yes.<|im_end|>"
        assert "Keys and values" in tokenizer.decode(one.input_ids)

    def test_prompts_are_what_a_server_would_read(self, tokenizer: object) -> None:
        one = render.encode(read(GOOD).examples[0], tokenizer)
        (at, prompt), = one.prompts
        assert at == 1
        assert prompt == tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=True, return_dict=False)
        assert one.input_ids[: len(prompt)] == prompt

    def test_cut_rows_are_named_and_rows_without_an_answer_are_problems(self, tokenizer: object) -> None:
        long = {"messages": [USER, {"role": "assistant", "content": "word " * 200}]}
        lost = {"messages": [{"role": "user", "content": "word " * 200}, SAID]}
        encoded, problems, cut = render.encode_all(read(GOOD, long, lost), tokenizer, 100)
        assert cut == [2, 3]
        assert [(p.line, p.code) for p in problems] == [(3, "nothing_left")]
        assert [len(one.input_ids) <= 100 and one.learnt > 0 for one in encoded] == [True, True]
        assert render.longest(encoded, 1)[0][0] == 2

    def test_a_template_that_rewrites_earlier_turns_is_refused(self, tokenizer: object) -> None:
        class Rewriting:
            eos_token_id = 2

            def get_vocab(self) -> dict:
                return {}

            def apply_chat_template(self, messages: list, **_: object) -> list[int]:
                return [len(messages), *range(10, 10 + len(messages)), 2]

        _, problems, _ = render.encode_all(read(GOOD), Rewriting(), 100)
        assert [(p.line, p.code) for p in problems] == [(1, "not_renderable")]

    def test_a_template_without_an_end_of_turn_is_refused(self) -> None:
        class Endless:
            eos_token_id = 2

            def get_vocab(self) -> dict:
                return {}

            def apply_chat_template(self, messages: list, add_generation_prompt: bool, **_: object) -> list[int]:
                return [10 + i for i in range(len(messages) * 2 + add_generation_prompt)]

        _, problems, _ = render.encode_all(read(GOOD), Endless(), 100)
        assert "end-of-turn" in problems[0].message


    def test_tool_calls_are_learnt_as_they_are_served(self) -> None:
        """Arguments were escaped twice: the template wrote the text of an object as a text (D1)."""
        class Templated:
            eos_token_id = 0
            seen: ClassVar[list] = []

            def get_vocab(self) -> dict:
                return {}

            def apply_chat_template(self, messages: list, *, add_generation_prompt: bool, **_: object) -> list[int]:
                self.seen.extend(call["function"]["arguments"] for m in messages for call in m.get("tool_calls", []))
                return [*range(1, len(messages)), 0] if not add_generation_prompt else list(range(1, len(messages) + 1))

        for said in ('{"city": "Paris"}', {"city": "Paris"}, ""):
            call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": said}}
            render.encode_all(read({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}), Templated(), 100)
        assert {json.dumps(arguments) for arguments in Templated.seen} == {'{"city": "Paris"}', "{}"}


class TestPlan:
    @pytest.mark.parametrize("rows", [10, 50, 270, 1000, 20_000])
    def test_auto(self, rows: int) -> None:
        chosen = resolve(Plan("j", "b", "t", 1), rows)
        assert 1 <= chosen.batch_size <= 16
        assert 3 <= chosen.n_epochs <= 10

    def test_numbers_stay(self) -> None:
        chosen = resolve(Plan("j", "b", "t", 1, n_epochs=2, batch_size=3, learning_rate_multiplier=0.5), 100)
        assert (chosen.n_epochs, chosen.batch_size, chosen.learning_rate_multiplier) == (2, 3, 0.5)

    def test_the_split_depends_on_rows_and_seed_only(self) -> None:
        rows = [{"question": f"q{i}", "answer": "a"} for i in range(100)]
        training, held = split(read(*rows), 1)
        assert len(held.examples) == 10
        again = split(read(*rows[::-1]), 1)[1]
        assert {e.fingerprint for e in again.examples} == {e.fingerprint for e in held.examples}
        assert {e.fingerprint for e in split(read(*rows), 2)[1].examples} != {e.fingerprint for e in held.examples}
        assert len(training.examples) + len(held.examples) == 100

    def test_a_row_and_its_copy_are_never_on_both_sides(self) -> None:
        rows = [{"question": f"q{i % 20}", "answer": "a"} for i in range(40)]
        training, held = split(read(*rows), 3)
        assert not {e.fingerprint for e in training.examples} & {e.fingerprint for e in held.examples}
        assert held.examples


class TestNames:
    def test_ids_are_the_only_names_that_become_paths(self) -> None:
        assert is_id(new_id("file"), "file")
        for bad in ("file-", "file-../../etc/passwd", "../file-" + "a" * 24, "file-" + "A" * 24, "ftjob-" + "a" * 24, "file-" + "a" * 24 + "\n"):
            assert not is_id(bad, "file"), bad

    def test_model_names(self) -> None:
        assert model_name("base", "mine", "ftjob-0123456789abcdef01234567") == "ft:base:mine:0123456789ab"
        assert model_name("base", None, "ftjob-0123456789abcdef01234567") == "ft:base::0123456789ab"

    def test_the_registry_takes_no_folder_of_somebody_elses_making(self) -> None:
        good = Adapter("ft:a", "ftjob-" + "0" * 24, "a", "d", "k", 1)
        raw = {"ft:a": json.dumps({f: getattr(good, f) for f in good.__struct_fields__})}
        for name, folder in (("ft:b", "../../etc"), ("ft:c", "/etc"), ("ft:d", "ftjob-" + "0" * 24 + "/.."), ("ft:e", "org/model")):
            raw[name] = raw["ft:a"].replace("ft:a", name).replace(good.folder, folder)
        raw["ft:f"] = "{"
        raw["ft:other"] = raw["ft:a"]
        assert read_registry(raw) == {"ft:a": good}

    @pytest.mark.parametrize(("given_", "shown"), [
        ("a.jsonl", "a.jsonl"), ("../../etc/passwd", "passwd"), ("c:\\x\\y.jsonl", "y.jsonl"), ("a\n\x00b", "ab"), ("", "file"), ("x" * 999, "x" * 255),
    ])
    def test_file_names_are_for_showing(self, given_: str, shown: str) -> None:
        assert clean_name(given_) == shown

    def test_pages(self) -> None:
        items = [{"id": str(i)} for i in range(5)]
        assert page(items, None, 2)["has_more"] is True
        assert [item["id"] for item in page(items, "1", 9)["data"]] == ["2", "3", "4"]
        assert page([], None, 2) == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


class TestPunica:
    @settings(deadline=None)  # torch's first call
    @given(st.lists(st.integers(-1, 2), min_size=1, max_size=12))
    def test_the_same_as_one_token_at_a_time(self, slots: list[int]) -> None:
        torch.manual_seed(0)
        indices = torch.tensor(slots)
        a = tuple(torch.randn(3, 1, 4, 8) for _ in range(2))
        b = tuple(torch.randn(3, 1, width, 4) for width in (6, 5))
        x, y = torch.randn(len(slots), 8), torch.randn(len(slots), 11)
        expected = y.clone()
        for row, slot in enumerate(slots):
            if slot >= 0:
                expected[row, :6] += 0.5 * (x[row] @ a[0][slot, 0].T) @ b[0][slot, 0].T
                expected[row, 6:] += 0.5 * (x[row] @ a[1][slot, 0].T) @ b[1][slot, 0].T
        wrapper = punica.GroupedPunica(64, 64, "cpu")
        wrapper._tokens = punica.groups(indices)
        wrapper.add_lora_linear(y, x, a, b, 0.5, (6, 5))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)

    def test_a_step_without_adapters_costs_nothing(self) -> None:
        assert punica.groups(torch.tensor([-1, -1, -1])) == []

    def test_what_vllm_calls_is_there(self) -> None:
        from vllm.platforms.cpu import CpuPlatform
        from vllm.utils.import_utils import resolve_obj_by_qualname

        assert CpuPlatform.get_punica_wrapper() == "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
        assert resolve_obj_by_qualname("services.worker.vllm.punica.GroupedPunica") is punica.GroupedPunica
