# Every target sets up all that it needs in .venv, skips what is already done, and is safe to repeat.
#
#   make demo   train nothing, download no model: steer the bundled one and measure the effect
#   make test   every test, stock vLLM on the CPU included
#   make test-versions   tests of the engines on the oldest and the newest Transformers and vLLM that are admitted
#   make test-oracles   kinds of intervention against the libraries that the methods come from
#   make serve-cpu   stock vLLM on the CPU with steering on: the bundled model, or MODEL=PATH
#   make lint   ruff and mypy
#   make test-gpu   the tests that need a CUDA device (see docs/performance.md)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CPU_VLLM := tests/support/vllm_cpu
# One thread per test process: the suite runs two of them, and tiny matrices lose time to threads. Bytecode is kept, for
# to compile all that an engine imports takes 15 s of each of its processes.
TEST_ENV := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 \
  TRIMTAB_TESTS_MUST_RUN=1

demo: $(VENV)/.base
	$(BIN)/trimtab demo --output demo-output

MODEL := src/trimtab/demo/model
serve-cpu: $(VENV)/.vllm
	VLLM_USE_V2_MODEL_RUNNER=0 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 \
	$(BIN)/vllm serve $(MODEL) --served-model-name model --enable-steering --host 127.0.0.1 --dtype float32 \
	  --enforce-eager --block-size 32 --kv-cache-memory-bytes 268435456 --max-num-seqs 16 $(SERVE_ARGS)

# Two runs: vLLM changes torch's settings in every process that imports it. The second runs whatever the first found.
# Three processes in the second, since a server and its client wait for each other.
PYTEST = $(TEST_ENV) $(BIN)/python -m pytest --dist loadgroup --no-loadscope-reorder
test: $(VENV)/.vllm
	@failed=0; set -x; \
	$(PYTEST) -n 2 --ignore tests/engines/vllm $(PYTEST_ARGS) || failed=1; \
	$(PYTEST) -n 3 tests/engines/vllm $(PYTEST_ARGS) || failed=1; \
	exit $$failed

# Both ends of what pyproject.toml admits. A version is a folder in front of .venv: what is not in it comes from there,
# torch above all. Every run checks and prints what it ran on; all of them run, and the command fails at the end.
FOLDER := .versions
VERSIONS := transformers-oldest transformers-newest vllm-oldest vllm-newest
ON_TRANSFORMERS := tests/engines/transformers tests/instrument tests/demo tests/test_cli.py tests/test_cli_probe.py
ON_VLLM := $(addprefix tests/engines/vllm/test_,$(addsuffix .py,engine_start parity prefix_cache refusals \
  compat doors placing flags vllm_conventions steered_layers server))
ON = PYTHONPATH=$(abspath $(FOLDER))/$(@:test-on-%=%) TRIMTAB_TEST_VERSIONS=tests/support/versions/$(@:test-on-%=%).txt

test-versions:
	@$(MAKE) --keep-going $(VERSIONS:%=test-on-%)

test-on-transformers-oldest test-on-transformers-newest: test-on-%: $(FOLDER)/%/.complete
	$(ON) $(PYTEST) -n 2 $(ON_TRANSFORMERS) $(PYTEST_ARGS)

test-on-vllm-oldest test-on-vllm-newest: test-on-%: $(FOLDER)/%/.complete
	$(ON) $(PYTEST) -n 3 $(ON_VLLM) $(PYTEST_ARGS)

# The libraries of tests/oracles are such a folder too: no other test finds them.
test-oracles: test-on-oracles
test-on-oracles: test-on-%: $(FOLDER)/%/.complete
	$(ON) $(PYTEST) -n 2 tests/oracles $(PYTEST_ARGS)

FOLDERS := $(patsubst %,$(FOLDER)/%/.complete,$(VERSIONS) oracles)
$(FOLDERS): $(FOLDER)/%/.complete: tests/support/versions/%.txt $(VENV)/.vllm
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $(@D) --requirement $<
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# On a GPU machine, without installing anything there: it needs torch, triton, numpy, pytest, pytest-timeout and
# pytest-xdist. Processes side by side, because most of the time goes into compiling.
test-gpu:
	PYTHONPATH=src OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m gpu tests -n 6 --durations=3 $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(FOLDER) demo-output

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "trimtab needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv module: apt-get install python3-venv"; exit 1; }

# torch first and alone: it is the CPU build here, and nothing after it may pull another one.
$(VENV)/.base: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable '.[transformers]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable '.[transformers,dev]'
	@touch $@

# Stock vLLM without its dependencies, which are the CUDA stack; what it needs on a CPU is listed beside the platform.
$(VENV)/.vllm: $(VENV)/.dev $(CPU_VLLM)/requirements.txt $(CPU_VLLM)/pyproject.toml $(wildcard $(CPU_VLLM)/*/*.py)
	$(PIP) --no-deps vllm==0.32.0 xgrammar==0.2.8 triton==3.7.1
	$(PIP) --requirement $(CPU_VLLM)/requirements.txt
	$(PIP) --no-deps ./$(CPU_VLLM)
	@touch $@

.PHONY: demo serve-cpu test test-versions $(VERSIONS:%=test-on-%) test-oracles test-on-oracles lint types test-gpu clean
