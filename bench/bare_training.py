"""The same training without us: PEFT and Trainer as their documentation shows them. `python -m bench.bare_training PLAN OUT`.

Reads the plan of a run and trains for as many steps with the same rows, batches and adapter; prints tokens per second.
"""

import json
import sys
import time
from pathlib import Path

import msgspec
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from services.trainer import loop, render
from services.trainer.plan import Plan, learning_rate, resolve
from services.trainer.run import read, split


def main(root: Path) -> None:
    plan = msgspec.json.decode((root / "plan.json").read_bytes(), type=Plan)
    tokenizer = AutoTokenizer.from_pretrained(plan.base)
    rows = render.encode_all(split(read(Path(plan.training_file)), plan.seed)[0], tokenizer, plan.max_tokens)[0]
    chosen = resolve(plan, len(rows))
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(plan.base, dtype=torch.bfloat16 if loop.computes_bf16() else torch.float32),
        LoraConfig(r=plan.lora.r, lora_alpha=plan.lora.alpha, lora_dropout=plan.lora.dropout,
                   target_modules=plan.lora.target_modules, task_type="CAUSAL_LM"),
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(root / "bare"), seed=plan.seed, use_cpu=True, bf16=loop.computes_bf16(), num_train_epochs=chosen.n_epochs,
            per_device_train_batch_size=chosen.batch_size, learning_rate=learning_rate(model.config.hidden_size, 1.0),
            lr_scheduler_type="cosine",
            warmup_steps=0.05, logging_steps=10_000, report_to=[], disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=[{"input_ids": one.input_ids, "labels": one.labels} for one in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    began = time.perf_counter()
    trainer.train()
    took = time.perf_counter() - began
    print(json.dumps({"tokens_per_s": sum(len(one.input_ids) for one in rows) * chosen.n_epochs / took}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
