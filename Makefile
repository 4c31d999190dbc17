# Everything starts from a machine with python3 and make: each target sets up its own .venv first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo check test test-all test-gpu bench clean

help:
	@echo "make demo      train a small nested model and see every exit (3 minutes on 2 CPU cores)"
	@echo "make check     style, imports, words, unit tests (about two minutes)"
	@echo "make test      that, and parallel layouts on 1 to 4 processes and whole programs"
	@echo "make test-all  the same with every row of the long tables"
	@echo "make test-gpu  the same bodies on an NVIDIA GPU"
	@echo "make bench     steps against megatron-core's own GPTModel, the loop, checkpoints, conversions, rules for exits; writes docs/benchmarks/"
	@echo "make setup     only the virtual environment"

setup: $(READY)

# A torch with an accelerator that is already there is kept; otherwise the tested build is installed.
$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than Python 3.10. Give another one: make PYTHON=python3.11 ..."; exit 1; }
	@echo "setting up $(VENV): one to three minutes, mostly downloads"
	@if $(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	    echo "keeping the torch that is installed: it sees a GPU"; \
	    $(PYTHON) -m venv --system-site-packages $(VENV); grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else \
	    $(PYTHON) -m venv $(VENV); cp constraints.txt $(VENV)/constraints.txt; \
	fi
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt torch
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python tools/demo.py

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest tests/rules tests/unit

test: check
	@$(BIN)/python -m pytest -m "not long" tests/ranks tests/system

test-all: check
	@$(BIN)/python -m pytest tests/ranks tests/system

test-gpu: $(READY)
	@$(BIN)/python -m pytest -m gpu tests/device

bench: $(READY)
	@$(BIN)/python tools/bench.py
	@$(BIN)/python tools/bench_run.py
	@$(BIN)/python tools/bench_convert.py
	@$(BIN)/python tools/bench_rules.py

clean:
	rm -rf $(VENV) runs build dist *.egg-info
