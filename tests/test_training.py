"""The training loop with a model of a few thousand weights: what a checkpoint brings back, how losses are weighed."""

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from common.gpus import Gpu, Gpus
from common.sizing import shape
from common.sizing.cards import CannotSay
from services.trainer import loop, room, run
from services.trainer.events import Events
from services.trainer.loop import Counting, collate, micro_batch
from services.trainer.plan import COMPLETE, Folder, Hyperparameters, Plan, rows_on_gpu
from services.trainer.render import IGNORED, Encoded


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                        num_key_value_heads=2, max_position_embeddings=64))


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (7, 7), (8, 8), (9, 3), (12, 6), (16, 8), (11, 1)])
def test_a_batch_is_computed_in_few_pieces(batch: int, rows: int) -> None:
    """7 and 9 were trained one row at a time (D6)."""
    assert micro_batch(batch, 8) == rows


@pytest.mark.parametrize(("vocabulary", "tokens", "rows"), [(128_256, 1024, 1), (32_768, 1024, 4), (49_152, 512, 5), (128_256, 8192, 1)])
def test_logits_do_not_fill_a_card(vocabulary: int, tokens: int, rows: int) -> None:
    """Eight rows of Llama-3's vocabulary took 10 GB of a 24 GB card (D8)."""
    assert rows_on_gpu(8, vocabulary, tokens) == rows


class TestRoom:
    plan = Plan("j", "/base", "t", 3, four_bit="auto")

    def on(self, monkeypatch: pytest.MonkeyPatch, gib: int, config: dict | None = None) -> None:
        known = shape.KNOWN["meta-llama/Meta-Llama-3-8B-Instruct"] if config is None else config
        monkeypatch.setattr(room.checkpoint, "config", lambda model, revision: known)
        monkeypatch.setattr(room.gpus, "look", lambda: Gpus("580.1", (Gpu("some card", gib << 30, 0),)))

    def test_a_large_card_trains_in_the_bits_it_serves_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for gib, bits in ((80, False), (16, True)):
            self.on(monkeypatch, gib)
            fit = room.on_a_gpu(self.plan, 128_256, 300)
            assert (fit.four_bit, fit.micro_batch) == (bits, 3)

    def test_what_is_not_known_gets_what_fits_most_cards(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on(monkeypatch, 80, {"architectures": ["MambaForCausalLM"]})
        assert room.on_a_gpu(self.plan, 128_256, 300).four_bit is True
        self.on(monkeypatch, 80)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
        assert room.on_a_gpu(self.plan, 128_256, 300).four_bit is True
        assert room.on_a_gpu(msgspec.structs.replace(self.plan, four_bit=False), 128_256, 300).four_bit is False

    def test_a_cpu_computes_in_more_bits(self) -> None:
        for asked in ("auto", True):  # bitsandbytes is not installed there
            plan = msgspec.structs.replace(self.plan, four_bit=asked)
            assert room.on_a_cpu(plan) == msgspec.structs.replace(self.plan, four_bit=False)

    def test_a_gpu_that_is_lost_trains_nobody_on_the_cpu(self) -> None:
        """The engines would sleep for hours meanwhile."""
        with pytest.raises(CannotSay, match="The GPU is lost"):
            room.on_a_cpu(msgspec.structs.replace(self.plan, gpu=True))

    def test_checkpoints_of_other_bits_are_not_gone_on_from(self, tmp_path: Path) -> None:
        """A job that was paused for an upgrade went on in 16 bits where it had begun in 4."""
        folder, plan = Folder(tmp_path), msgspec.structs.replace(self.plan, four_bit=True)
        last = folder.checkpoints / "checkpoint-3"
        assert run.resumed(plan, folder, Quiet()) is None
        last.mkdir(parents=True)
        (last / COMPLETE).touch()
        assert run.resumed(msgspec.structs.replace(plan, base="/moved/base", micro_batch=1), folder, Quiet()) == last
        said = Quiet()
        assert run.resumed(msgspec.structs.replace(plan, four_bit=False), folder, said) is None
        assert "four_bit True is False" in said._out.getvalue()
        assert not last.exists()

    def test_a_run_that_cannot_fit_says_so_before_it_has_the_gpu(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.on(monkeypatch, 4)
        monkeypatch.setattr(loop, "on_gpu", lambda: True)
        monkeypatch.setattr(run, "prepare", lambda *_: ([Encoded(1, [1] * 900, [1] * 900, ())],) * 2)
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: [0] * 128_256)
        folder = Folder(tmp_path)
        folder.plan.write_bytes(msgspec.json.encode(self.plan))
        with pytest.raises(SystemExit) as ended:
            run.main(tmp_path)
        assert str(ended.value).startswith("A LoRA run does not fit: the base")
        assert "ready" not in capsys.readouterr().out


def test_a_validation_loss_counts_tokens_not_rows(tmp_path: Path) -> None:
    """A row of two learnt tokens counted as much as one of forty (D6)."""
    rows = [{"input_ids": list(range(1, n + 3)), "labels": [IGNORED, IGNORED, *range(3, n + 3)]} for n in (2, 40, 3, 5)]
    model = tiny()
    trainer = Counting(model=model, data_collator=collate, eval_dataset=rows, args=TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=1, use_cpu=True, report_to=[], prediction_loss_only=True,
        remove_unused_columns=False, disable_tqdm=True))
    said = trainer.evaluate()["eval_loss"]
    nats = tokens = 0.0
    for row in rows:
        batch = collate([row])
        with torch.no_grad():
            logits = model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
        learnt = batch["labels"][:, 1:] != IGNORED
        nats += float(torch.nn.functional.cross_entropy(logits[:, :-1][learnt], batch["labels"][:, 1:][learnt], reduction="sum"))
        tokens += int(learnt.sum())
    assert said == pytest.approx(nats / tokens, rel=1e-4)
    assert trainer.accuracy(training=False) >= 0


class Quiet(Events):
    def __init__(self) -> None:
        self._out = io.StringIO()


def test_a_run_that_was_broken_off_stops_as_early_as_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count of evaluations that got worse began anew with each start (D4)."""
    from peft import LoraConfig, get_peft_model

    def rows(seed: int, count: int) -> list[Encoded]:
        draw = torch.Generator().manual_seed(seed)
        made = [torch.randint(1, 64, (12,), generator=draw).tolist() for _ in range(count)]
        return [Encoded(n, ids, [IGNORED] * 4 + ids[4:], ()) for n, ids in enumerate(made)]

    def run(name: str, stop_after: int, last: Path | None = None) -> dict[str, float] | None:
        folder = Folder(tmp_path / name)
        folder.root.mkdir(exist_ok=True)
        folder.gate.write_text('[{"tokens": [1, 2, 3], "learnt": [2]}]')
        folder.root.mkdir(exist_ok=True)
        folder.pause.unlink(missing_ok=True)
        model = get_peft_model(tiny(), LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"))
        evaluate = loop.Watch.on_evaluate

        def then_pause(watch: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
            evaluate(watch, args, state, *rest, **more)
            if state.global_step >= stop_after:
                folder.pause.touch()

        monkeypatch.setattr(loop.Watch, "on_evaluate", then_pause)
        result = loop.train(plan, chosen, folder, model, None, rows(1, 8), rows(2, 8), Quiet(), last)
        monkeypatch.setattr(loop.Watch, "on_evaluate", evaluate)
        return result

    plan = Plan("j", "b", "t", 3)
    chosen = Hyperparameters(n_epochs=40, batch_size=4, learning_rate_multiplier=3.0)
    whole = run("whole", stop_after=10**6)
    assert whole is not None
    assert whole["steps"] < 80, "what it learns by heart makes others worse"
    best = int(whole["best_step"])
    assert run("broken", stop_after=best + 2) is None, "paused after an evaluation that was worse"
    last = max((p for p in (tmp_path / "broken/checkpoints").iterdir() if (p / COMPLETE).exists()), key=lambda p: int(p.name.rpartition("-")[2]))
    again = run("broken", 10**6, last)
    assert again is not None
    assert (again["steps"], again["best_step"]) == (whole["steps"], whole["best_step"])
    assert again["valid_loss"] == pytest.approx(whole["valid_loss"], abs=1e-4)


def test_a_checkpoint_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut could leave the word that it is complete, and not its weights (A10)."""
    folder, synced = Folder(tmp_path), []
    path = folder.checkpoints / "checkpoint-3"
    (path / "deep").mkdir(parents=True)
    for name in ("weights", "deep/optimizer"):
        (path / name).write_bytes(b"x")
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append((os.readlink(f"/proc/self/fd/{fd}"), (path / COMPLETE).exists())), real(fd)))
    watch = loop.Watch(folder, SimpleNamespace(say=lambda *_, **__: None), 1)  # type: ignore[arg-type]
    watch.on_save(None, SimpleNamespace(global_step=3), None)
    before = [name for name, complete in synced if not complete]
    assert set(before) == {str(path), str(path / "weights"), str(path / "deep"), str(path / "deep/optimizer")}
    assert synced[-1] == (str(path), True)
