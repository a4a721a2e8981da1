#!/bin/sh
# Installs llm-compressor, whose packages are others than the stack's: install.sh PYTHON (cpu|cuda)
set -eu
python=$1
here=$(dirname "$0")
torch=2.13.0
if [ "$2" = cpu ]; then
    # torch's CPU build is not on PyPI: a local wheel folder (pip's find-links) is asked first, then PyTorch's index.
    "$python" -m pip install --progress-bar off "torch==$torch+cpu" 2>/dev/null ||
        "$python" -m pip install --progress-bar off --index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
else
    PIP_FIND_LINKS=$(mktemp -d)
    export PIP_FIND_LINKS
    "$python" -m pip install --progress-bar off "torch==$torch"
fi
"$python" -m pip install --progress-bar off -c "$here/constraints.txt" llmcompressor==0.14.0.1
