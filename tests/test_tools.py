"""`make quantize`, `make compare`, `make profile`: their arithmetic, their files, and the whole way on real engines."""

import gzip
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
import torch
import yaml
from rich.console import Console

from common import checkpoint, formats
from common.sizing import shape
from services.local import catalog
from services.local.catalog import Entry
from services.local.errors import UserError
from services.local.model import NAME
from services.local.plan import ROOT
from services.tools.compare import command as comparing
from services.tools.compare import figures, load, recipe, report
from services.tools.profile import trace
from services.tools.quantize import card, engine, gate, making, register, texts
from services.tools.quantize import command as command_of_quantize
from services.tools.quantize.gate import Served, Verdict
from services.worker import profiling
from services.worker.settings import WorkerSettings
from services.worker.vllm import command
from tests.harness import free_ports, wait_for
from tests.up import Up, started

BUNDLED = ROOT / ".state/models" / NAME
ROWS = [{"messages": [{"role": "user", "content": f"What is {n} plus {n}?"}, {"role": "assistant", "content": f"{n} plus {n} is {2 * n}, of course. " * 6}]}
        for n in range(12)]


def scheme(bits: int, inputs: int | None, kind: str = "int", group: int | None = None) -> dict[str, object]:
    """A config.json's part, as llm-compressor writes it."""
    weights = {"num_bits": bits, "type": kind, "group_size": group}
    said = {"weights": weights, "input_activations": {"num_bits": inputs} if inputs else None}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": said}}}


class TestFormats:
    @pytest.mark.parametrize(("config", "expected"), [
        ({"dtype": "bfloat16"}, ("bf16", 16)), ({"torch_dtype": "float16"}, ("fp16", 16)), ({}, ("", 16)), ({"dtype": "float32"}, ("fp32", 32)),
        (scheme(8, 8), ("w8a8", 8)), (scheme(4, None, group=64), ("w4a16", 4)), (scheme(8, 8, "float"), ("fp8", 8)),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ("awq", 4)), ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, ("gptq", 3)),
        ({"quantization_config": {"quant_method": "fp8"}}, ("fp8", 8)), ({"quantization_config": {"quant_method": "bitnet"}}, ("bitnet", 16)),
    ])
    def test_as_people_call_them(self, config: dict, expected: tuple[str, int]) -> None:
        assert formats.of(config)[:2] == expected

    def test_a_quantised_model_is_sized(self) -> None:
        whole = {**shape.KNOWN["mistralai/Mistral-7B-Instruct-v0.3"]}
        sizes = {name: shape.of_config(whole | said, "m").weights_bytes() for name, said in
                 (("bf16", {}), ("w8a8", scheme(8, 8)), ("w4a16", scheme(4, None, group=128)),
                  ("columns", {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": -1}}))}
        assert 0.5 < sizes["w8a8"] / sizes["bf16"] < 0.55
        assert 0.25 < sizes["columns"] / sizes["bf16"] < sizes["w4a16"] / sizes["bf16"] < 0.31

    def test_where_a_quantised_one_comes_from(self, tmp_path: Path) -> None:
        assert checkpoint.original("org/model", "abc") == ("org/model", "abc")
        card.made(tmp_path, "/models/base", "", "gptq", {}, "d")
        assert checkpoint.original(str(tmp_path)) == ("/models/base", "")
        assert checkpoint.format_name(str(tmp_path)) == "gptq"


    @pytest.mark.parametrize("said", ["", "[]", "{}", '{"method": 1', "\xff"])
    def test_what_is_none_of_ours_ends_no_worker(self, tmp_path: Path, said: str) -> None:
        (tmp_path / checkpoint.MADE).write_text(said)
        (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors", "config_groups": []}}')
        assert checkpoint.original(str(tmp_path), "r") == (str(tmp_path), "r")
        assert checkpoint.format_name(str(tmp_path)) in ("", "w16a16")
        (tmp_path / "config.json").write_text('{"quantization_config": "odd"}')
        assert checkpoint.format_name(str(tmp_path)) == ""


class TestNorms:
    def test_the_kernel_gives_what_the_operators_give(self) -> None:
        code = (
            "import torch\n"
            "from vllm.config import VllmConfig, set_current_vllm_config\n"
            "from vllm.model_executor.layers.layernorm import RMSNorm\n"
            "from services.worker.vllm import norms\n"
            "torch.manual_seed(1); torch.set_default_dtype(torch.bfloat16)\n"
            "with set_current_vllm_config(VllmConfig()):\n"
            "    layer = RMSNorm(576, 1e-5); layer.weight.data.normal_(1, 0.2)\n"
            "    same = lambda a, b: torch.testing.assert_close(a, b, atol=0.04, rtol=0.02)\n"
            "    for tokens in (1, 7, 200):\n"
            "        x, r = torch.randn(tokens, 576), torch.randn(tokens, 576)\n"
            "        same(norms.rms_norm(layer, x.clone()), layer.forward_native(x.clone()))\n"
            "        for a, b in zip(norms.rms_norm(layer, x.clone(), r.clone()), layer.forward_native(x.clone(), r.clone())): same(a, b)\n"
            "    odd = torch.randn(4, 1152)[:, ::2]\n"
            "    same(norms.rms_norm(layer, odd), layer.forward_native(odd))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


class TestTexts:
    def test_documents_are_split_and_none_is_in_both(self) -> None:
        made, measured = texts.split(None)
        assert len(made) > len(measured) > 10
        assert not {row["text"] for row in made} & {row["text"] for row in measured}

    def test_the_owners_rows(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        made, measured = texts.split(file)
        assert (len(made), len(measured)) == (8, 4)
        file.write_text('{"question": 1}\n')
        with pytest.raises(UserError, match=r"rows\.jsonl"):
            texts.split(file)
        with pytest.raises(UserError, match="No such file"):
            texts.split(tmp_path / "none.jsonl")


class TestRegister:
    def entries(self, path: Path) -> list[tuple[str, str]]:
        return [(entry["name"], entry["source"]) for entry in yaml.safe_load(path.read_text())["models"]]

    @pytest.mark.parametrize("text", [
        "# mine\nmodels:\n  - name: a   # first\n    source: bundled\n\n  # the last\n  - {name: b, source: bundled}\n\nawake: 1   # one\n",
        "models:\n- name: a\n  source: bundled\n- name: b\n  source: bundled",
        "awake: 2\nmodels: [{name: a, source: bundled}, {name: b, source: bundled}]\n# the end\n",
        "models:\n  - name: a\n    source: bundled\n  - name: b\n    source: bundled\n    # about b\n\n\n",
        "models: &all\n  - {name: a, source: bundled}\n  - {name: b, source: bundled}\nawake: 1\n",
        "models: !!seq\n  - {name: a, source: bundled}\n  - {name: b, source: bundled}\n",
    ])
    def test_an_entry_more_and_everything_else_as_it_was(self, tmp_path: Path, text: str) -> None:
        path, folder = tmp_path / "models.yaml", tmp_path / "new"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        path.write_text(text)
        assert register.register(path, Entry(name="a-w8a8", source=str(folder)), Entry(name="a"))
        assert self.entries(path) == [("a", "bundled"), ("b", "bundled"), ("a-w8a8", str(folder))]
        left = path.read_text()
        for line in text.splitlines():
            if not line.startswith("models: ["):
                assert line in left
        assert not register.register(path, Entry(name="a-w8a8", source=str(folder)), Entry(name="a"))
        assert len(self.entries(path)) == 3

    def test_a_file_that_would_be_wrong_stays_as_it_was(self, tmp_path: Path) -> None:
        path, real = tmp_path / "models.yaml", tmp_path / "real.yaml"
        real.write_text("models: [{name: a}]\n")
        real.chmod(0o640)
        path.symlink_to(real)
        with pytest.raises(UserError, match=r"no checkpoint"):
            register.register(path, Entry(name="b", source=str(tmp_path / "nothing")), Entry(name="a"))
        assert real.read_text() == "models: [{name: a}]\n"
        (tmp_path / "config.json").write_text("{}")
        assert register.register(path, Entry(name="b", source=str(tmp_path)), Entry(name="a"))
        assert path.is_symlink()
        assert real.stat().st_mode & 0o777 == 0o640
        assert sorted(file.name for file in tmp_path.iterdir()) == [".real.yaml.lock", "config.json", "models.yaml", "real.yaml"]

    def test_without_a_file_the_original_stays(self, tmp_path: Path) -> None:
        folder = tmp_path / "new: odd # name"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        path = tmp_path / "models.yaml"
        assert register.register(path, Entry(name="m-gptq", source=str(folder), adapters=False, max_tokens=512), Entry(name="m", source="org/M@v1"))
        assert self.entries(path) == [("m", "org/M@v1"), ("m-gptq", str(folder))]
        assert [entry.adapters for entry in catalog.read(path).models] == [True, False]


class TestGate:
    def test_divergence(self) -> None:
        p = {1: math.log(0.6), 2: math.log(0.3)}
        assert gate.divergence(p, p) == pytest.approx(0.0, abs=1e-12)
        q = {1: math.log(0.3), 2: math.log(0.6)}
        whole = 0.6 * math.log(2) + 0.3 * math.log(0.5)
        assert gate.divergence(p, q) == pytest.approx(whole)
        assert 0 < gate.divergence(p, {1: math.log(0.3), 9: math.log(0.6)}) <= whole + 1e-9
        assert gate.divergence({1: math.log(0.9)}, {2: math.log(0.9)}) >= 0

    def test_perplexity_is_of_the_tokens_that_are_there(self) -> None:
        places = [[{5: math.log(0.5), 7: math.log(0.25)}, {8: math.log(0.125)}]]
        assert gate.perplexity([[3, 7, 8]], places) == pytest.approx(math.exp((math.log(4) + math.log(8)) / 2))

    @pytest.fixture
    def quantising(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The command with its engine and its compressor played: which digests were made."""
        monkeypatch.setenv("STATE_DIR", str(tmp_path / "state"))
        monkeypatch.setenv("MODELS_FILE", str(tmp_path / "models.yaml"))
        base = tmp_path / "m"
        base.mkdir()
        (base / "config.json").write_text('{"dtype": "bfloat16"}')
        (tmp_path / "models.yaml").write_text("models: [{name: m, source: ./m, max_tokens: 512, replicas: 2}]\n")
        served = Served(10.0, 100, 1.0, {"1": 1.0, "16": 2.0})
        verdict = Verdict(served, msgspec.structs.replace(served, perplexity=10.6), 0.1, 0.9, 0.5, 100)
        made: list[str] = []

        def make(entry: Entry, method: str, rows: list, target: Path, digest: str, *_: object) -> None:
            made.append(digest)
            target.mkdir(parents=True, exist_ok=True)
            (target / "config.json").write_text("{}")
            card.made(target, entry.source, entry.revision, method, {"weights": "int4"}, digest)

        monkeypatch.setattr(making, "_make", make)
        monkeypatch.setattr(making, "_room", lambda *_: None)
        monkeypatch.setattr(making, "_measured", lambda *_: verdict)
        return made

    def test_one_that_lost_too_much_is_said_and_not_registered(self, tmp_path: Path, quantising: list[str]) -> None:
        quantize = command_of_quantize.quantize
        with pytest.raises(UserError, match=r"m-awq lost 6\.0%.*MAX_PERPLEXITY_LOSS=0\.05"):
            quantize("m", "awq", None, 0.05, Console())
        assert len(catalog.read(tmp_path / "models.yaml").models) == 1
        assert "(+6.0%)" in (tmp_path / "state/models/m-awq/README.md").read_text()
        quantize("m", "awq", None, 0.06 + 1e-9, Console())
        assert len(quantising) == 1, "it is measured again, not made again"
        _, new = catalog.read(tmp_path / "models.yaml").models
        assert (new.name, new.max_tokens, new.replicas, new.adapters) == ("m-awq", 512, 1, False)

    def test_other_texts_make_it_anew_and_another_original_is_refused(self, tmp_path: Path, quantising: list[str]) -> None:
        quantize = command_of_quantize.quantize
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        quantize("m", "awq", None, 1, Console())
        quantize("m", "awq", tmp_path / "rows.jsonl", 1, Console())
        assert len(set(quantising)) == 2
        other = tmp_path / "other/m"
        other.mkdir(parents=True)
        (other / "config.json").write_text("{}")
        with pytest.raises(UserError, match="is a copy of"):
            quantize(str(other), "awq", None, 1, Console())
        (tmp_path / "state/models/m-gptq").mkdir()
        with pytest.raises(UserError, match="was not made by make quantize"):
            quantize("m", "gptq", None, 1, Console())

    @pytest.mark.parametrize(("model", "method", "said"), [
        ("m", "int3", "METHOD=int3"), ("m", "", r"METHOD=\(nothing\)"), ("nobody", "awq", "MODEL=nobody: neither bundled"), ("./none", "awq", "neither bundled"),
        ("my model", "awq", "cannot be a model's name"), ("quantised", "awq", "quantised is w8a8 already"),
    ])
    def test_mistakes_are_said_before_anything_is_made(
        self, tmp_path: Path, quantising: list[str], monkeypatch: pytest.MonkeyPatch, model: str, method: str, said: str
    ) -> None:
        for name, config in (("my model", {}), ("quantised", scheme(8, 8))):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=said):
            command_of_quantize.quantize(model, method, None, 1, Console())
        assert not quantising

    def test_no_number_is_no_pass(self, tmp_path: Path, quantising: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        served = Served(math.nan, 100, 1.0, {"1": 1.0})
        monkeypatch.setattr(making, "_measured", lambda *_: Verdict(served, served, 0.1, 0.9, 0.5, 100))
        with pytest.raises(UserError, match="It is not registered"):
            command_of_quantize.quantize("m", "awq", None, 100, Console())
        assert len(catalog.read(tmp_path / "models.yaml").models) == 1

    def test_what_a_killed_run_left_is_gone(self, tmp_path: Path) -> None:
        folder = tmp_path / ".m-awq.making"
        (folder / "made").mkdir(parents=True)
        with making._emptied(folder) as folder_of_it:
            assert not list(folder_of_it.iterdir())
        assert not folder.exists()

    def test_two_at_once(self, tmp_path: Path, quantising: list[str]) -> None:
        import fcntl

        (tmp_path / "state/models").mkdir(parents=True)
        with open(tmp_path / "state/models/.m-awq.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="Somebody else is quantising"):
                command_of_quantize.quantize("m", "awq", None, 1, Console())


def event(name: str, begin: float, length: float, cat: str = "cpu_op", **more: object) -> dict[str, object]:
    return {"ph": "X", "name": name, "cat": cat, "ts": begin, "dur": length, "tid": 1, "pid": 1, **more}


class TestTrace:
    STEPS = (
        event("execute_context_0(0)_generation_1(1)", 0, 100, "user_annotation"), event("_C::onednn_mm", 10, 40, args={"Input Dims": [[1, 8], [8, 4]]}),
        event("vllm::unified_attention_with_output", 50, 30), event("_C::cpu_attention_with_kv_cache", 55, 20),
        event("aten::argmax", 110, 10), event("execute_context_0(0)_generation_1(1)", 150, 50, "user_annotation"),
        event("_C::rms_norm", 150, 50), event("nobody::knows", 200, 10), event("aten::copy_", -20, 10),
    )

    def test_the_shares_add_up(self) -> None:
        found = trace.summarise(self.STEPS)
        assert (found.steps, found.whole_ms, found.device) == (2, 0.21, "CPU operators")
        expected = {"GEMM": 40, "attention": 30, trace.BETWEEN: 30, "sampling": 10, "norm and elementwise": 50, trace.OTHER: 10, trace.LOOP: 40}
        assert {name: round(share * 210) for name, share in found.shares.items()} == expected
        assert found.explained == pytest.approx(1 - 10 / 210, abs=1e-3)
        assert (found.top[0].name, found.top[1].shapes) == ("_C::rms_norm", "[1, 8] × [8, 4]")

    def test_on_a_gpu_the_kernels_count(self) -> None:
        kernels = [event("nvjet_tst_128x8", 20, 60, "kernel", tid=7), event("flash_fwd_splitkv_kernel", 90, 60, "kernel", tid=7),
                   event("Memcpy DtoH", 160, 10, "gpu_memcpy", tid=7)]
        found = trace.summarise([*self.STEPS, *kernels])
        assert found.device == "GPU kernels"
        assert {name: round(share * 210) for name, share in found.shares.items()} == {"GEMM": 60, "attention": 60, "memory": 10, trace.BETWEEN: 80}

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        path = tmp_path / "t.json.gz"
        for data in (b"x", gzip.compress(b"{}"), gzip.compress(b'{"traceEvents": []}')):
            path.write_bytes(data)
            with pytest.raises(trace.Unreadable):
                trace.read(path)


class TestCompare:
    def test_prompts_are_the_same_for_all_and_others_in_each_round(self, tmp_path: Path) -> None:
        lengths = recipe.Lengths(prompt_tokens=20, answer_tokens=8, spread=0.5)
        assert load.prompts(lengths, 50, 1) == load.prompts(lengths, 50, 1) != load.prompts(lengths, 50, 2)
        rows = load.prompts(lengths, 200, 3)
        words = [len(str(row["prompt"]).split()) for row in rows]
        assert (min(words), max(words)) == (10, 30)
        (tmp_path / "t.jsonl").write_text('{"prompt_tokens": 7, "completion_tokens": 3}\n{"prompt_tokens": 9, "completion_tokens": 2}\n')
        recorded = load.prompts(recipe.Lengths(trace=str(tmp_path / "t.jsonl")), 3, 0)
        assert [(len(str(row["prompt"]).split()), row["output_tokens"]) for row in recorded] == [(7, 3), (9, 2), (7, 3)]
        (tmp_path / "t.jsonl").write_text("\n")
        with pytest.raises(UserError, match="no request in this trace"):
            load.prompts(recipe.Lengths(trace=str(tmp_path / "t.jsonl")), 3, 0)
        (tmp_path / "t.jsonl").write_text("{}\n")
        with pytest.raises(UserError, match="a trace is JSONL"):
            load.prompts(recipe.Lengths(trace=str(tmp_path / "t.jsonl")), 3, 0)

    def test_the_recipes_are_read_and_mistakes_are_said(self, tmp_path: Path) -> None:
        path = ROOT / "examples/compare.yaml"
        assert {name: len(recipe.read(path, name).sides) for name in ("self", "quantised", "trtllm")} == {"self": 2, "quantised": 2, "trtllm": 2}
        with pytest.raises(UserError, match=r"RECIPE=none: .* has self, quantised, trtllm"):
            recipe.read(path, "none")
        (tmp_path / "r.yaml").write_text("a: {sides: [{model: m}], closed: []}\n")
        with pytest.raises(UserError, match="there is no load"):
            recipe.read(tmp_path / "r.yaml", "a")
        (tmp_path / "r.yaml").write_text("a: {sides: [{model: m, ulr: x}]}\n")
        with pytest.raises(UserError, match="ulr"):
            recipe.read(tmp_path / "r.yaml", "a")
        assert [side.shown for side in comparing.recipe_of("one one http://h/v1=two", 3).sides] == ["one", "one (2)", "two"]
        with pytest.raises(UserError, match="which models"):
            comparing.recipe_of(" ", 3)

    def test_agreement(self) -> None:
        assert figures.agreement(["abcd", "x"], ["abzz", "x"]) == (0.5, 0.75)

    def test_the_page_shows_what_was_measured_and_no_markup_of_others(self, tmp_path: Path) -> None:
        said = {f"p{at}_{name}_ms": 5.0 for at in (50, 95, 99) for name in figures.LATENCIES}
        rounds = [{"output_throughput": 100.0 + n, "request_throughput": 2.0, "request_goodput": 1.5, "failed": n, "total_input_tokens": 10,
                   "total_output_tokens": 20, **said} for n in range(3)]
        found = [figures.of(side, "16 at once", rounds) for side in ("one", "<b>two")]
        assert (found[0].tokens_per_s, found[0].failed, found[0].ms["ttft"]["p95"]) == (101.0, 3, 5.0)
        facts = {"sides": [{"label": "one", "flags": "--a"}, {"label": "<b>two"}], "machine": {"cores": "2"}, "agreement": {"<b>two": (0.5, 0.7)},
                 "recipe": msgspec.to_builtins(comparing.recipe_of("one two", 3)), "at": "today"}
        page = report.write(tmp_path / "out", found, facts).read_text()
        assert page.count("<svg") == 2
        assert "<b>two" not in page
        assert "101.0" in page
        assert json.loads((tmp_path / "out/report.json").read_text())["figures"][0]["rounds"] == 3

    def test_the_recipe_for_two_endpoints_runs_on_the_doubles(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The recipe that is for a GPU, its two servers played by doubles: TensorRT-LLM's refuses what the original refuses."""
        wanted = recipe.read(ROOT / "examples/compare.yaml", "trtllm")
        ports = free_ports(2)
        sides = [msgspec.structs.replace(side, model="double", url=f"http://127.0.0.1:{port}/v1") for side, port in zip(wanted.sides, ports, strict=True)]
        small = msgspec.structs.replace(
            wanted, sides=sides, closed=[], open=[20], requests=4, rounds=1, tokenizer=str(BUNDLED),
            lengths=recipe.Lengths(prompt_tokens=9, answer_tokens=8, spread=0))
        monkeypatch.setenv("STATE_DIR", str(tmp_path))
        monkeypatch.setenv("MODELS_FILE", str(tmp_path / "models.yaml"))
        (tmp_path / "models.yaml").write_text("models: [{name: m}]\n")
        doubles = [subprocess.Popen([sys.executable, "-m", "tests.doubles", kind, str(port)], cwd=ROOT)
                   for kind, port in zip(("sglang", "trtllm"), ports, strict=True)]
        try:
            for port in ports:
                wait_for(lambda port=port: httpx.get(f"http://127.0.0.1:{port}/health").is_success, "the double", 30)
            page = comparing.compare(small, Console())
            said = json.loads(page.with_name("report.json").read_text())
            assert [(one["load"], one["side"], one["failed"]) for one in said["figures"]] == [
                ("20 a second", "vLLM", 0), ("20 a second", "TensorRT-LLM", 0)]
            assert said["agreement"] == {"TensorRT-LLM": [1.0, 1.0]}
            assert all(one["answer_tokens"] == 32 for one in said["figures"])
            long = msgspec.structs.replace(small, lengths=recipe.Lengths(prompt_tokens=9, answer_tokens=40, spread=0))
            with pytest.raises(UserError, match="made 32 tokens where 160 were asked for"):
                comparing.compare(long, Console())
            with pytest.raises(UserError, match="has no model 'other', but double"):
                comparing.compare(msgspec.structs.replace(small, sides=[msgspec.structs.replace(sides[0], model="other")]), Console())
        finally:
            for double in doubles:
                double.kill()
                double.wait()


class TestProfiling:
    def test_a_wish_that_cannot_be_read_is_answered(self, tmp_path: Path) -> None:
        import asyncio

        settings = WorkerSettings.model_construct(engine_port=1)
        profiler = profiling.Profiler(settings, tmp_path / "p", lambda: 0)
        (tmp_path / "p" / profiling.WISH).write_text('{"concurrent": 0}')

        async def look() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(profiler.wished(), 1.5)

        asyncio.run(look())
        said = msgspec.json.decode((tmp_path / "p" / profiling.RESULT).read_bytes(), type=profiling.Result)
        assert "concurrent" in said.error
        assert not (tmp_path / "p" / profiling.WISH).exists()

    def test_a_folder_that_cannot_be_made_keeps_no_worker_from_serving(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        profiling.Profiler(WorkerSettings.model_construct(engine_port=1), tmp_path / "file/below", lambda: 0)

    def test_an_engine_that_is_silent_is_said(self, tmp_path: Path) -> None:
        import asyncio

        token = tmp_path / "token"
        token.write_text("x" * 32)
        settings = WorkerSettings.model_construct(engine_port=free_ports(1)[0], worker_token_file=token, served_model_name="m", model="m")
        profiler = profiling.Profiler(settings, tmp_path, lambda: 0)
        asyncio.run(profiler.run())
        assert "ConnectError" in msgspec.json.decode((tmp_path / profiling.RESULT).read_bytes(), type=profiling.Result).error

    def test_a_wish_that_nobody_waits_for_is_forgotten(self, tmp_path: Path) -> None:
        import asyncio

        profiler = profiling.Profiler(WorkerSettings.model_construct(engine_port=1), tmp_path, lambda: 0)
        (tmp_path / profiling.WISH).write_bytes(msgspec.json.encode(profiling.Wish(id="old", at=time.time() - 60)))

        async def look() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(profiler.wished(), 1.5)

        asyncio.run(look())
        assert not list(tmp_path.glob("*.json"))

    def test_one_that_is_cut_off_is_answered(self, tmp_path: Path) -> None:
        import asyncio

        token = tmp_path / "token"
        token.write_text("x" * 32)
        settings = WorkerSettings.model_construct(engine_port=free_ports(1)[0], worker_token_file=token, served_model_name="m", model="m")
        profiler = profiling.Profiler(settings, tmp_path, lambda: 0)

        async def silent(*_: object) -> None:
            await asyncio.sleep(60)

        async def cut() -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(profiler, "_trace", silent)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(profiler.run(), 0.2)

        asyncio.run(cut())
        assert "cut off" in msgspec.json.decode((tmp_path / profiling.RESULT).read_bytes(), type=profiling.Result).error

    def test_an_answer_to_somebody_else_is_none(self, tmp_path: Path) -> None:
        (tmp_path / profiling.RESULT).write_bytes(msgspec.json.encode(profiling.Result(profiling.Wish(id="theirs"), error="theirs")))

        def answer() -> None:
            wait_for(lambda: (tmp_path / profiling.WISH).exists(), "a wish")
            wish = msgspec.json.decode((tmp_path / profiling.WISH).read_bytes(), type=profiling.Wish)
            with pytest.raises(OSError, match="somebody else"):
                profiling.ask(tmp_path, profiling.Wish())
            (tmp_path / profiling.RESULT).write_bytes(msgspec.json.encode(profiling.Result(wish, error="ours")))

        answering = threading.Thread(target=answer)
        answering.start()
        assert profiling.ask(tmp_path, profiling.Wish(concurrent=3)).error == "ours"
        answering.join()
        assert not (tmp_path / profiling.WISH).exists()

    def test_who_asks_nobody_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(profiling, "TAKEN_WITHIN_S", 0.5)
        with pytest.raises(TimeoutError, match="no worker looks into"):
            profiling.ask(tmp_path, profiling.Wish())
        assert not (tmp_path / profiling.WISH).exists()


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model by `make quantize METHOD=w8a8`, from a few rows; its models.yaml is beside it."""
    folder = tmp_path_factory.mktemp("quantised")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    state = folder / "state"
    (state / "models").mkdir(parents=True)
    if BUNDLED.exists():
        (state / "models" / NAME).symlink_to(BUNDLED)
    print("\nquantising the bundled model, some two minutes", flush=True)
    env = os.environ | {"STATE_DIR": str(state), "MODELS_FILE": str(folder / "models.yaml"), "METHOD": "w8a8", "DATA": str(folder / "rows.jsonl"),
                        "MAX_PERPLEXITY_LOSS": "0.3"}
    (folder / "models.yaml").write_text(f"models:\n  - {{name: {NAME}, max_tokens: 2048}}\n")
    done = subprocess.run(["make", "quantize"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return state / "models" / f"{NAME}-w8a8"


class TestQuantised:
    def test_what_was_made(self, quantised: Path) -> None:
        said = json.loads((quantised / checkpoint.MADE).read_text())
        assert (said["method"], said["original"]) == ("w8a8", str(quantised.with_name(NAME)))
        measured = said["gate"]
        assert 0.5 < measured["quantised"]["size_bytes"] / measured["original"]["size_bytes"] < 0.65
        assert measured["quantised"]["perplexity"] / measured["original"]["perplexity"] < 1.3
        assert measured["top1_agreement"] > 0.6
        assert "| perplexity |" in (quantised / "README.md").read_text()
        assert (quantised / "generation_config.json").exists()

    def test_tuned_models_on_it(self, quantised: Path, tmp_path: Path) -> None:
        """vLLM alone would not start: oneDNN has packed the weights away that it asks for their device."""
        tuned_on(quantised, quantised.with_name(NAME), tmp_path)


def tuned_on(served: Path, original: Path, folder: Path) -> None:
    """An adapter of the original is loaded onto what was made of it while that serves, and answers; the base as before."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    torch.manual_seed(3)
    get_peft_model(base, LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)).save_pretrained(folder / "tuned")
    with engine.alone({"MODEL": str(served), "ADAPTERS_DIR": str(folder)}, cuda=False, log=folder / "log") as one:
        ids = engine.tokens(one, {"text": "The capital of France is"}, 20)
        before = engine.greedy(one, ids)
        asked = {"lora_name": "tuned", "lora_path": str(folder / "tuned")}
        assert one.http.post("/v1/load_lora_adapter", json=asked).is_success
        tuned = {"model": "tuned", "prompt": ids, "max_tokens": 20, "temperature": 0, "return_token_ids": True}
        said = one.http.post("/v1/completions", json=tuned).raise_for_status().json()["choices"][0]["token_ids"]
        assert said and said != before[:20]
        assert engine.greedy(one, ids) == before


@pytest.fixture(scope="module")
def up(quantised: Path) -> Iterator[Up]:
    folder = quantised.parents[2]
    (folder / "stack").mkdir()
    with started(folder / "stack", 0, MODELS_FILE=str(folder / "models.yaml")) as stack:
        yield stack


def tools(up: Up, *words: str, **env: str) -> subprocess.CompletedProcess:
    told = os.environ | {"STATE_DIR": str(up.state), "MODELS_FILE": str(up.state.parents[1] / "models.yaml")} | env
    return subprocess.run([sys.executable, "-m", "services.tools", *words], cwd=ROOT, env=told, capture_output=True, text=True, timeout=900)


class TestOnAStack:
    def test_the_format_is_shown(self, up: Up) -> None:
        listed = {model.id: (model.model_extra or {})["format"] for model in up.sdk.models.list().data}
        assert listed == {NAME: "bf16", f"{NAME}-w8a8": "w8a8"}
        status = httpx.get(f"{up.base}/v1/status", headers={"authorization": f"Bearer {up.key}"}).json()
        assert {worker["format"] for worker in status["workers"]} == {"bf16", "w8a8"}
        assert up.ask("Hello", model=f"{NAME}-w8a8")

    def test_a_profile_and_back(self, up: Up) -> None:
        """Nobody else serves its model: it is refused, then forced; meanwhile it is out, and afterwards back."""
        name = next(one for one in (up.state / "profiles").iterdir() if "w8a8" in one.name).name
        refused = tools(up, "profile", WORKER=name)
        assert refused.returncode == 1
        assert "FORCE=1" in refused.stderr.replace("\n", " ")
        states: set[str] = set()
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                status = httpx.get(f"{up.base}/v1/status", headers={"authorization": f"Bearer {up.key}"}).json()
                states.update(f"{one['state']} {one['held']}" for one in status["workers"] if one["id"].startswith(name))
                time.sleep(0.3)

        watching = threading.Thread(target=watch)
        watching.start()
        done = tools(up, "profile", WORKER=name, FORCE="1", N="2")
        over.set()
        watching.join()
        assert done.returncode == 0, done.stdout + done.stderr
        assert "GEMM" in done.stdout
        assert "draining a profile" in states
        said = msgspec.json.decode((up.state / "profiles" / name / "summary.json").read_bytes(), type=trace.Summary)
        assert said.explained >= 0.95
        assert (said.steps, said.layers) == (profiling.STEPS, 30)
        wait_for(lambda: up.ask("Hello again", model=f"{NAME}-w8a8"), "back in rotation", 30)
        flame = up.state / "profiles" / name / "flame.svg"
        assert flame.exists() or "no flame graph" in done.stdout
        gone = tools(up, "profile", WORKER="nobody")
        assert "there is no such vLLM worker" in gone.stderr.replace("\n", " ")

    def test_a_comparison(self, up: Up) -> None:
        recipes = up.state.parent / "recipes.yaml"
        recipes.write_text(yaml.safe_dump({"mine": {"sides": [{"model": NAME}, {"model": f"{NAME}-w8a8"}], "closed": [4], "requests": 8, "rounds": 1,
                                                    "lengths": {"prompt_tokens": 20, "answer_tokens": 16}}}))
        done = tools(up, "compare", RECIPE="mine", RECIPES=str(recipes))
        assert done.returncode == 0, done.stdout + done.stderr
        [found] = (up.state / "compared").glob("*/report.json")
        said = json.loads(found.read_text())
        assert [one["failed"] for one in said["figures"]] == [0, 0]
        assert {side["format"] for side in said["sides"]} == {"bf16", "w8a8"}
        assert all(5 < one["tokens_per_s"] < 5000 for one in said["figures"]), "an answer from the cache is not one of the engine's"


def test_a_worker_alone_has_the_flags_of_one_in_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    from services.worker import alone

    monkeypatch.setenv("MODEL", "org/model")
    settings = alone.Alone()
    assert command.command(settings) == [*command.bare(settings), "--middleware", command.MIDDLEWARE]
