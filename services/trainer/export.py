"""A tuned model as a plain checkpoint folder: `python -m services.trainer.export BASE ADAPTER TARGET`.

The adapter's matrices are added into the base's weights (in fp32, stored in the base's dtype), so that anything that
reads a checkpoint can serve it: MODEL=TARGET make up.
"""

import argparse
import shutil
import sys
from pathlib import Path


def export(base: Path, adapter: Path, target: Path) -> None:
    """Make `target`, all of it or nothing. Raises FileExistsError, OSError."""
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    dtype = AutoConfig.from_pretrained(base).dtype
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    model.merge_and_unload(safe_merge=True).to(dtype).save_pretrained(partial)
    AutoTokenizer.from_pretrained(base).save_pretrained(partial)
    for file in partial.iterdir():
        file.chmod(0o644)
    partial.rename(target)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m services.trainer.export", description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="the base model's checkpoint folder")
    parser.add_argument("adapter", type=Path, help="the adapter's folder (.state/adapters/ftjob-...)")
    parser.add_argument("target", type=Path, help="the folder to make")
    args = parser.parse_args()
    for what, folder, file in (("base", args.base, "config.json"), ("adapter", args.adapter, "adapter_config.json")):
        if not (folder / file).is_file():
            sys.exit(f"export: {what} {folder} has no {file}")
    try:
        export(args.base, args.adapter, args.target)
    except OSError as error:
        sys.exit(f"export: {error}")


if __name__ == "__main__":
    main()
