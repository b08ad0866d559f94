# Every target sets up all that it needs in .venv, skips what is already done, and is safe to repeat.
#
#   make demo   train nothing, download no model: steer the bundled one and measure the effect
#   make test   every test, stock vLLM on the CPU included
#   make lint   ruff and mypy
#   make test-gpu   the tests that need a CUDA device (see docs/performance.md)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CPU_VLLM := tests/support/vllm_cpu
# One thread per test process: the suite runs two of them, and tiny matrices lose time to threads.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 \
  TRIMTAB_TESTS_MUST_RUN=1

.PHONY: demo test lint types test-gpu clean

demo: $(VENV)/.base
	$(BIN)/trimtab demo --output demo-output

# Two runs: vLLM changes torch's settings in every process that imports it. The second runs whatever the first found.
test: $(VENV)/.vllm
	@failed=0; set -x; \
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/engines/vllm $(PYTEST_ARGS) || failed=1; \
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile tests/engines/vllm $(PYTEST_ARGS) || failed=1; \
	exit $$failed

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
	rm -rf $(VENV) demo-output

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
