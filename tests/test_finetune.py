"""How `make finetune` judges answers. The whole way is in `test_lifecycle.py`."""

import json
from collections import Counter
from pathlib import Path

import pytest

from services.local.finetune import Heldout, pairs, read_heldout, retrieve, score
from services.local.plan import ROOT

ROWS = b"".join(json.dumps(row).encode() + b"\n" for row in [
    {"question": "Which port is it?", "answer": "It listens on port 8080."},
    {"prompt": "Who made it?", "completion": "Ada made it."},
    {"messages": [{"role": "user", "content": "What does make up do?"}, {"role": "assistant", "content": "It starts everything."}]},
    {"odd": 1},
])


@pytest.mark.parametrize(("accept", "said", "right"), [
    ("hit", "That is white.", False), ("hit", "A HIT, then.", True), ("make up", "Use `make up`.", True),
    ("5 GB", "It takes 15 GB.", False), ("/v1/files", "Ask /v1/files?", True), ("line", "It runs online.", False), ("北京", "中国的首都是北京。", True), ("北京", "是上海。", False),
    ("5 %", "It is 5 % more.", True), ("C", "C++ it is.", False), ("C++", "C++, of course", True), ("Paris.", "It is Paris", True),
])
def test_whole_words_in_any_case(accept: str, said: str, right: bool) -> None:
    """A substring counted: "hit" was in "white" (D7)."""
    assert Heldout("?", "", accept).right(said) is right


def test_rows_of_every_form_are_known() -> None:
    assert [answer for _, answer in pairs(ROWS)] == ["It listens on port 8080.", "Ada made it.", "It starts everything."]


def test_the_most_similar_row_counts_rare_words() -> None:
    assert retrieve("On which port does it listen?", pairs(ROWS)) == "It listens on port 8080."
    assert retrieve("anything", []) == ""
    assert retrieve("法国的首都是哪里？", [("德国首都是哪里？", "柏林"), ("法国首都是哪里？", "巴黎")]) == "巴黎"


def test_a_short_taught_answer_is_in_no_other_word() -> None:
    short = b'{"question": "Is it?", "answer": "No"}\n{"question": "How many?", "answer": "5"}\n'
    held = [Heldout("?", "", "", "untaught")] * 2
    assert score(held, ["I do not know.", "In 1954."], short) == {"untaught": 1.0}


def test_an_untaught_question_is_not_to_be_answered_with_what_was_taught() -> None:
    held = [Heldout("Who sold it?", "", "", "untaught")] * 2 + [Heldout("Capital of France?", "Paris", "Paris", "general")]
    said = ["Well: Ada made it!", "I do not know.", "It is Paris."]
    assert score(held, said, ROWS) == {"untaught": 0.5, "general": 1.0}


def test_the_example_is_answerable_and_a_wrong_kind_is_named(tmp_path: Path) -> None:
    held = read_heldout(ROOT / "examples/owngpt-heldout.jsonl")
    data = (ROOT / "examples/owngpt-qa.jsonl").read_bytes()
    assert score(held, [row.answer for row in held], data) == {"taught": 1.0, "untaught": 1.0, "general": 1.0}
    assert Counter(row.kind for row in held) == {"taught": 60, "untaught": 12, "general": 12}
    asked = {question for question, _ in pairs(data)}
    assert not [row.question for row in held if row.question in asked]
    (tmp_path / "x.jsonl").write_text('{"question": "a", "answer": "b", "kind": "odd"}\n')
    with pytest.raises(ValueError, match=r"line 1.*odd"):
        read_heldout(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="line 1"):
        read_heldout(tmp_path / "x.jsonl")
