"""What fits on a card: the arithmetic beside what models' pages, real checkpoints and vLLM itself say."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.sizing import cards, memory, price, shape, speed, training
from common.sizing.cards import CannotSay
from common.sizing.memory import BLOCK_TOKENS, Serving
from services.local import estimate
from services.local.errors import UserError
from services.local.plan import ROOT

PUBLISHED = {  # parameters as the models' own files count them (safetensors' metadata on the hub)
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552, "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248, "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}


class TestShape:
    @pytest.mark.parametrize(("model", "count"), PUBLISHED.items())
    def test_parameters_are_those_the_model_has(self, model: str, count: int) -> None:
        assert shape.read(model).parameters() == count

    def test_a_quantised_model_weighs_what_its_files_do(self) -> None:
        """Qwen2.5-7B-Instruct-AWQ: 5,571 MB of safetensors on the hub."""
        assert shape.read("Qwen/Qwen2.5-7B-Instruct-AWQ").weights_bytes() == pytest.approx(5.571e9, rel=0.01)

    def test_split_over_gpus_every_weight_is_somewhere(self) -> None:
        whole = shape.read("meta-llama/Meta-Llama-3-8B-Instruct")
        for gpus in (2, 4, 8):
            assert whole.weights_bytes() <= gpus * whole.weights_bytes(gpus) <= 1.001 * whole.weights_bytes()
        assert whole.kv_bytes_per_token(8) * 8 == whole.kv_bytes_per_token()
        assert whole.kv_bytes_per_token(16) == whole.kv_bytes_per_token(8), "a KV head is not split"

    @pytest.mark.parametrize(("change", "said"), [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"), ({"architectures": None}, "none"),
        ({"hidden_size": None}, "lacks"), ({"quantization_config": {"quant_method": "aqlm"}}, "aqlm"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "3 bits"), ({"num_hidden_layers": "x"}, "lacks"),
    ])
    def test_what_is_not_known_is_said(self, change: dict, said: str) -> None:
        config = shape.KNOWN["mistralai/Mistral-7B-Instruct-v0.3"] | change
        with pytest.raises(CannotSay, match=said):
            shape.of_config(config, "some/model")

    def test_a_name_that_is_nowhere(self) -> None:
        with pytest.raises(CannotSay, match=r"config\.json of some/model is not on this machine"):
            shape.read("some/model")


class TestCards:
    @pytest.mark.parametrize(("said", "name"), [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("a100-80", "A100-80"), ("L40S", "L40S"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"), ("NVIDIA L4", "L4"), ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090"), ("Tesla T4", "T4"),
    ])
    def test_by_the_names_people_and_drivers_use(self, said: str, name: str) -> None:
        assert cards.find(said).name == name

    def test_an_unknown_one(self) -> None:
        with pytest.raises(CannotSay, match="Radeon"):
            cards.find("Radeon VII")

    def test_none_is_there_twice(self) -> None:
        assert len({card.name for card in cards.CARDS}) == len(cards.CARDS)


class TestMemory:
    @given(st.sampled_from(sorted(shape.KNOWN)), st.sampled_from(cards.CARDS), st.sampled_from([1, 2, 4]),
           st.floats(0.1, 1.0), st.integers(0, 200_000), st.integers(0, 2000), st.integers(0, 16))
    def test_nothing_is_dealt_out_twice(
        self, model: str, card: cards.Card, gpus: int, utilization: float, tokens: int, count: int, loras: int
    ) -> None:
        found = shape.read(model)
        try:
            dealt = memory.serve(found, card, Serving(gpus, utilization, tokens, count, loras))
        except CannotSay:
            return
        used = dealt.weights_bytes + dealt.step_bytes + dealt.lora_bytes + dealt.fixed_bytes + dealt.kv_bytes
        assert used <= card.memory_bytes * utilization
        assert 0 < dealt.max_tokens <= min(dealt.kv_tokens, found.max_tokens)
        assert dealt.kv_blocks * BLOCK_TOKENS * dealt.kv_bytes_per_token <= dealt.kv_bytes
        assert dealt.together(dealt.max_tokens) >= 1

    def test_what_does_not_fit_says_how_much_is_missing(self) -> None:
        found, card = shape.read("meta-llama/Llama-3.1-8B-Instruct"), cards.find("RTX 4090")
        with pytest.raises(CannotSay, match=r"131072 tokens needs 16\.0 GiB: 11\.\d GiB are missing"):
            memory.serve(found, card, Serving(max_tokens=131072))
        with pytest.raises(CannotSay, match="missing"):
            memory.serve(found, cards.find("T4"), Serving())

    def test_what_is_said_to_be_missing_is_enough(self) -> None:
        found, card = shape.read("meta-llama/Llama-3.1-8B-Instruct"), cards.find("T4")
        with pytest.raises(CannotSay) as caught:
            memory.serve(found, card, Serving())
        missing = float(str(caught.value).rpartition(": ")[2].split()[0])
        for more, fits in ((missing + 0.1, True), (missing - 0.1, False)):
            larger = dataclasses.replace(card, memory_bytes=card.memory_bytes + int(more / 0.9 * 2**30))
            try:
                memory.serve(found, larger, Serving())
                assert fits
            except CannotSay:
                assert not fits

    def test_heads_that_cannot_be_split(self) -> None:
        found = shape.of_config({**shape.KNOWN["Qwen/Qwen2.5-7B-Instruct"]}, "q")
        with pytest.raises(CannotSay, match="28 attention heads cannot be split over 8 GPUs; over 1, 2, 4"):
            memory.serve(found, cards.find("H100"), Serving(gpus=8))

    def test_vllms_own_defaults_for_a_card(self) -> None:
        """vllm/engine/arg_utils.py, get_batch_defaults."""
        assert (memory.step_tokens(cards.find("H100")), memory.sequences(cards.find("H100"))) == (8192, 1024)
        assert (memory.step_tokens(cards.find("A100-80")), memory.sequences(cards.find("A100-80"))) == (2048, 256)


def test_training_in_four_bits_is_smaller() -> None:
    found = shape.read("meta-llama/Meta-Llama-3-8B-Instruct")
    whole, four = training.lora(found, four_bit=False), training.lora(found, four_bit=True)
    assert whole.base_bytes == 2 * found.parameters()
    assert four.base_bytes < 0.4 * whole.base_bytes
    assert four.total_bytes < cards.find("RTX 4090").memory_bytes
    assert training.lora(found, four_bit=True, tokens=1024, rows=8).logits_bytes == 3 * 4 * 8 * 1024 * 128_256


class TestTraining:
    llama = shape.read("meta-llama/Meta-Llama-3-8B-Instruct")

    @pytest.mark.parametrize(("gib", "asked", "tokens", "chosen"), [
        (80, None, 1024, (False, 4)), (30, None, 1024, (False, 4)), (24, None, 1024, (False, 2)), (24, False, 1024, (False, 4)), (19, None, 1024, (True, 4)), (80, True, 1024, (True, 4)),
        (16, None, 4096, (True, 1)),
    ])
    def test_the_bits_the_base_is_served_in_where_they_fit(
        self, gib: int, asked: bool | None, tokens: int, chosen: tuple[bool, int]
    ) -> None:
        assert training.choose(self.llama, gib << 30, tokens=tokens, most=4, four_bit=asked) == chosen

    @given(st.integers(1, 80), st.integers(1, 8192), st.integers(1, 8), st.sampled_from([None, True, False]))
    def test_what_is_chosen_fits_and_one_row_more_does_not(self, gib: int, tokens: int, most: int, asked: bool | None) -> None:
        def need(four_bit: bool, rows: int) -> float:
            one = training.lora(self.llama, four_bit=four_bit, tokens=tokens, rows=rows).total_bytes
            return one / training.SURE if asked is None and not four_bit else one

        try:
            bits, rows = training.choose(self.llama, gib << 30, tokens=tokens, most=most, four_bit=asked)
        except CannotSay:
            assert need(asked is not False, 1) > gib << 30
            return
        assert need(bits, rows) <= gib << 30
        assert rows == most or need(bits, rows + 1) > gib << 30
        assert bits == asked if asked is not None else not bits or need(False, 1) > gib << 30

    def test_what_would_help_is_said(self) -> None:
        with pytest.raises(CannotSay, match=r"the base 15\.0 GiB, .* of one row of 1024 tokens, .*; 12\.0 GiB are there\. Shorter rows \(TRAIN_MAX_TOKENS\), a base in 4 bits"):
            training.choose(self.llama, 12 << 30, tokens=1024, most=4, four_bit=False)
        with pytest.raises(CannotSay, match=r"GiB in 4 bits, .*; 4\.0 GiB are there\. Shorter rows \(TRAIN_MAX_TOKENS\) or a larger card"):
            training.choose(self.llama, 4 << 30, tokens=1024, most=4)


def test_a_step_is_bound_by_memory_until_there_are_many() -> None:
    found, card = shape.read("mistralai/Mistral-7B-Instruct-v0.3"), cards.find("A100-80")
    alone = speed.decode_tokens_per_s(found, card)
    assert alone == pytest.approx(card.bandwidth_bytes_per_s * 0.7 / found.weights_bytes(), rel=0.05)
    assert 20 * alone < speed.decode_tokens_per_s(found, card, together=32) < 32 * alone
    assert speed.prefill_tokens_per_s(found, card) > 50 * alone


class TestPrices:
    def test_the_table_is_read_and_every_card_in_it_is_known(self) -> None:
        prices = estimate.read_prices()
        assert {found.card for found in prices.cards} <= {card.name for card in cards.CARDS}
        assert prices.of("T4").rent is None

    @pytest.mark.parametrize(("text", "said"), [("cards: [", "cards"), ("date: 2026-01-01", "host_usd"),
                                                ("date: soon", "date")])
    def test_a_mistake_is_named(self, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / "prices.yaml").write_text(text)
        with pytest.raises(UserError, match=f"prices.yaml.*{said}" if said != "cards" else "prices.yaml"):
            estimate.read_prices(tmp_path / "prices.yaml")

    def test_when_buying_pays(self) -> None:
        prices = estimate.read_prices()
        bought = price.Price("RTX 4090", 0.5, 1900)
        hours = price.break_even_hours(bought, 450, prices)
        assert hours * 0.5 == pytest.approx(1900 + prices.host_usd + hours * price.owned_usd_per_hour(450, prices))
        assert math.isnan(price.break_even_hours(price.Price("L4", 0.5), 72, prices))
        assert math.isinf(price.break_even_hours(price.Price("x", 0.01, 10), 450, prices))

    def test_a_million_tokens(self) -> None:
        assert price.usd_per_million(3.6, 1000) == pytest.approx(1.0)


def test_make_plan(tmp_path: Path) -> None:
    def plan(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "services.local", "plan", *words], cwd=ROOT, capture_output=True, text=True,
                              check=False, env={"PATH": "/usr/bin:/bin", "COLUMNS": "200"})

    usual = plan()
    assert usual.returncode == 0, usual.stderr
    for said in ("RTX 4090", "A100-80", "131,072 KV bytes a token", "The 5,000-dollar plan", "Disk: 14.5 GB for the model", "16 bits"):
        assert said in usual.stdout
    one = plan("--model", "meta-llama/Llama-3.1-8B-Instruct", "--gpu", "rtx 4090", "--tokens", "131072")
    assert "11.8 GiB are missing" in one.stdout
    odd = tmp_path / "config.json"
    odd.write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    for words in (("--model", str(tmp_path)), ("--gpu", "GTX 480")):
        wrong = plan(*words)
        assert wrong.returncode == 1
        assert "Traceback" not in wrong.stderr
        assert wrong.stderr.startswith("owngpt:")


def test_the_budget_in_the_documents_is_the_tables() -> None:
    page = (ROOT / "docs/hosts.md").read_text()
    for row in estimate.budget(estimate.read_prices()):
        assert f"| {' | '.join(row)} |" in page, "docs/hosts.md: the 5,000-dollar plan"
