# make up      the stack as local processes, in the foreground      make doctor   what is wrong with it, and what to do
# make env     exports for the openai SDK                           make top      the running stack in the terminal
# make key NAME=alice    one more API key                           make keys     all of them; make revoke ID=… ends one
# make finetune DATA=questions.jsonl    your own model from your own questions (HELDOUT=file SUFFIX=name EPOCHS=3)
# make apply   models.yaml as it is now, while the stack serves (apply-compose: for containers)
# make restart all workers and the gateway anew, one after the other, while the stack serves (restart-compose: for containers)
# make quantize METHOD=w8a8   a smaller copy of a model (gptq, awq; MODEL=name DATA=questions.jsonl), measured, in models.yaml (quantize-compose: by a container)
# make compare MODELS="one two"   the same load against several models or endpoints; a page (RECIPE=name of examples/compare.yaml)
# make profile an engine from inside: where its time goes (WORKER=worker-2 N=8 LOAD=mixed)
# make plan    what fits on which GPU, how fast, at what price (MODEL=org/name GPU="RTX 4090" GPUS=1 TOKENS=8192)
# make backup  everything in one archive, while it runs             make restore FROM=…   into an empty STATE_DIR
# make test    everything that can be tested here                   make check    linters and types
# make bench   the figures of docs/log.md (bench-kv, -lifecycle, -observability, -faults, -hosts, -engines, -scale: of their parts)
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
# Dials on the command line (make up WORKERS=2) reach the programs by themselves: make exports them.

.PHONY: help up env key keys revoke doctor plan quantize quantize-compose compare profile apply apply-compose restart restart-compose backup restore top finetune test check bench bench-kv bench-lifecycle bench-observability bench-faults bench-hosts bench-engines bench-scale check-cuda check-gpu base-images clean

help:
	@sed -n '1,13s/^# //p' Makefile

up: .venv/.ready
	@exec $(PY) -m services.local up

env: .venv/.ready
	@$(PY) -m services.local env

top: .venv/.ready
	@exec $(PY) -m services.local top

key: .venv/.ready
	@$(PY) -m services.local key "$(NAME)"

keys: .venv/.ready
	@$(PY) -m services.local keys

doctor: .venv/.ready
	@$(PY) -m services.local doctor

apply: .venv/.ready
	@$(PY) -m services.local apply

# For containers: models.yaml becomes models.compose.yaml; what changed comes up beside the old, then the old drains.
.venv-tools/.ready: constraints.txt
	@test -x .venv-tools/bin/python || python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "owngpt: python3 is older than 3.10. With a newer one: python3.11 -m venv .venv-tools, then again" >&2; exit 1; }
	@test -x .venv-tools/bin/python || python3 -m venv .venv-tools
	@.venv-tools/bin/pip install -q -c constraints.txt msgspec pyyaml && touch $@

apply-compose: .venv-tools/.ready
	@services/local/compose.sh apply

restart-compose:
	@services/local/compose.sh restart

restart: .venv/.ready
	@$(PY) -m services.local restart

plan: .venv/.ready
	@$(PY) -m services.local plan

# llm-compressor wants other packages than vLLM.
.venv-quantize/.ready: .venv/.ready services/tools/quantize/install.sh services/tools/quantize/constraints.txt
	@python=$${PYTHON:-python3.11}; echo "installing llm-compressor into .venv-quantize (once; about 1.5 GB, a minute)"; \
	    $$python -m venv .venv-quantize && mkdir -p .venv-quantize && \
	    $$python services/local/progress.py .venv-quantize/install.log "llm-compressor" 60 \
	    services/tools/quantize/install.sh .venv-quantize/bin/python "$$(cat .venv/accelerator)"
	@touch $@

quantize: .venv-quantize/.ready
	@exec $(PY) -m services.tools quantize

quantize-compose: .venv-tools/.ready
	@exec .venv-tools/bin/python -m services.tools.quantize.containers

.venv/.tools-ready: .venv/.ready services/tools/requirements.txt
	@$(PY) -m pip install -q -c constraints.txt -r services/tools/requirements.txt
	@touch $@

compare: .venv/.tools-ready
	@exec $(PY) -m services.tools compare

profile: .venv/.ready
	@exec $(PY) -m services.tools profile

backup: .venv/.ready
	@$(PY) -m services.local backup "$(or $(TO),owngpt-$(shell date +%Y%m%d-%H%M%S).tar.gz)"

restore: .venv/.ready
	@test -n "$(FROM)" || { echo "owngpt: which archive? make restore FROM=owngpt-….tar.gz" >&2; exit 1; }
	@$(PY) -m services.local restore "$(FROM)"

revoke: .venv/.ready
	@$(PY) -m services.local revoke "$(ID)"

finetune: .venv/.ready
	@test -n "$(DATA)" || { echo "owngpt: which questions? make finetune DATA=questions.jsonl" >&2; exit 1; }
	@eval "$$($(PY) -m services.local env)" && exec $(PY) -m services.local.finetune "$(DATA)" \
	    $(if $(HELDOUT),--heldout "$(HELDOUT)") $(if $(SUFFIX),--suffix "$(SUFFIX)") $(if $(EPOCHS),--epochs "$(EPOCHS)")

# Made once; a change of a requirements file or of the constraints makes it again.
.venv/.ready: constraints.txt common/requirements.txt gateway/requirements.txt services/gpu_exporter/requirements.txt services/jobs/requirements.txt services/ledger/requirements.txt services/trainer/requirements.txt services/worker/requirements.txt services/local/requirements.txt services/worker/install-cpu.sh services/worker/install-cuda.sh services/local/install.sh services/local/accelerator.py
	@services/local/install.sh services/local/requirements.txt
	@touch $@

.venv/.test-ready: .venv/.ready tests/requirements.txt services/tools/requirements.txt
	@$(PY) -m pip install -q -c constraints.txt -r tests/requirements.txt
	@touch $@

test: .venv/.test-ready check
	@$(PY) -m pytest tests

check: .venv/.test-ready
	@tests/check.sh

bench: .venv/.test-ready
	@$(PY) -m bench $(BENCH)

bench-kv: .venv/.test-ready
	@$(PY) -m bench kv $(BENCH) && $(PY) -m bench.plot

bench-lifecycle: .venv/.test-ready
	@$(PY) -m bench lifecycle $(BENCH)

bench-faults: .venv/.test-ready
	@$(PY) -m bench faults $(BENCH)

bench-hosts: .venv/.test-ready
	@$(PY) -m bench hosts $(BENCH)

bench-engines: .venv/.test-ready
	@$(PY) -m bench engines $(BENCH)

bench-scale: .venv/.test-ready
	@$(PY) -m bench scale $(BENCH) && $(PY) -m bench.plot

bench-observability: .venv/.test-ready
	@$(PY) -m bench observability $(BENCH)

# Needs no GPU: vLLM's CUDA build (some 6 GB, in .cuda-env) under a driver that is none. Before a release.
check-cuda: .venv/.test-ready
	@test -x .cuda-env/bin/python || { python3.11 -m venv .cuda-env && grep -v -e '^triton==' -e '^apache-tvm-ffi==' constraints.txt \
	    >.cuda-env/constraints.txt && services/worker/install-cuda.sh .cuda-env/bin/python .cuda-env/constraints.txt; }
	@.cuda-env/bin/python -m pip install -q -c .cuda-env/constraints.txt -r services/worker/requirements.txt
	@$(PY) -m tests.cuda

# Needs one: writes bench/results/gpu.json.
check-gpu: .venv/.test-ready
	@$(PY) -m tests.gpu

base-images:
	@services/base/make.sh

clean:
	rm -rf .venv .venv-tools .venv-quantize .bench-env .cuda-env
