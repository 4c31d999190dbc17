# Everything starts from a machine with python3 and make: each target sets up its own .venv first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# What make test-megatron and test-versions run; a -k takes rows (MEGATRON_TESTS="tests/ranks/test_layouts.py -k pp2").
MEGATRON_TESTS ?= tests/unit tests/ranks/test_layouts.py tests/ranks/test_precision.py tests/ranks/test_checkpoint.py tests/ranks/test_fsdp.py tests/ranks/test_lora.py tests/ranks/test_experts.py tests/ranks/test_context_parallel.py
# more arguments for pytest in check, test, test-all, test-faults, test-launch and test-megatron, such as --no-skips
PYTEST_OPTIONS ?=
VERSIONS_OPTIONS ?=
export OMP_NUM_THREADS ?= 1
WORKERS ?= 2
# one process: launchers end process groups, and with them workers
LAUNCH = $(BIN)/python -m pytest -rs $(PYTEST_OPTIONS) tests/launch
TESTS = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_OPTIONS)

NPU_VENV  := .venv-npu
NPU_READY := $(NPU_VENV)/.ready
# make -n would run a line with MAKE itself in it
SELF := $(MAKE)
# What make test-npu runs.
NPU_TESTS ?= tests/npu
VLLM_VENV := .venv-vllm
# What make test-vllm runs.
VLLM_TESTS ?= tests/vllm

.PHONY: help setup demo check docs test test-all test-faults test-gpu test-launch test-npu accept-npu test-vllm test-megatron test-versions bench bench-serving contest clean

help:
	@echo "make demo      train a small nested model and see every exit (3 to 4 minutes on 2 CPU cores)"
	@echo "make check     style, imports, wording, unit tests (two to three minutes on 2 cores)"
	@echo "make test      that, and parallel layouts on 1 to 4 processes and whole programs (15 to 20 minutes)"
	@echo "make test-all  the same with every row of the long tables"
	@echo "make test-faults  kills at random moments, damaged input, other people's clients, in great numbers"
	@echo "make test-launch  job scripts with a real SLURM and sshd on this machine, as root (.ci/install brings what is missing)"
	@echo "make test-gpu  the same bodies on an NVIDIA GPU"
	@echo "make test-megatron VERSION=0.19.2  unit tests, layouts and checkpoints under another megatron-core"
	@echo "make test-versions  before a release: those with every row, checkpoints and a fine-tuning under every supported megatron-core (hours)"
	@echo "make test-npu  the same bodies through torch_npu on simulated Ascend NPUs, under two versions of megatron-core (needs gcc; about four minutes each; VERSION=0.17.1: under that one)"
	@echo "make test-vllm  the plug-in inside vLLM's build for CPUs, in an environment of its own (about 3 GB; 10 minutes; VERSION=0.28.0: the other tested version)"
	@echo "make accept-npu  what the first day on real Ascend NPUs must show (accept-npu ON=simulation: a trial without them)"
	@echo "make bench     steps against megatron-core's own GPTModel, the loop, checkpoints, conversions, rules for exits, decoding; writes docs/benchmarks/"
	@echo "make contest  decoding on CPUs beside llama.cpp, built from its sources, and transformers; writes docs/results/contest.md (hours)"
	@echo "make bench-serving MODEL=... QUESTIONS=...  our server with 1 to 32 clients; SERVING_OPTIONS names others to compare with; writes docs/benchmarks/serving.md"
	@echo "make docs      the documentation as a site, in docs/_build/html (half a minute)"
	@echo "make setup     only the virtual environment"

setup: $(READY)

# A torch with an accelerator that is already there is kept; otherwise the tested build is installed.
$(READY): setup.py constraints.txt megatron_sorted/platform/supported.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than Python 3.10. Give another one: make PYTHON=python3.11 ..."; exit 1; }
	@echo "setting up $(VENV): one to three minutes, mostly downloads"
	@if $(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	    echo "keeping the torch that is installed: it sees a GPU"; \
	    $(PYTHON) -m venv --system-site-packages $(VENV); \
	    $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(VENV)/lib/python3*/site-packages)/given_python.pth; \
	    grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else \
	    $(PYTHON) -m venv $(VENV); cp constraints.txt $(VENV)/constraints.txt; \
	fi
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt torch
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python -m lab.demo

# two workers, each file's tests in one of them; WORKERS=0 runs all tests in one process
check: $(READY)
	@$(BIN)/ruff format --check -q . || { echo "error: some files are not formatted. $(BIN)/ruff format . does it."; exit 1; }
	@$(BIN)/ruff check .
	@$(TESTS) -m "not long and not faults" tests/rules tests/unit

# the documentation as a site, in docs/_build/html; a warning, such as a link that leads nowhere, is an error
docs: $(READY)
	@$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

test: check
	@$(TESTS) -m "not long and not faults" -rs tests/ranks tests/system tests/faults
	@$(LAUNCH) -m "not long"

test-all: check
	@$(TESTS) -m "not faults" -rs tests/unit tests/ranks tests/system tests/faults
	@$(LAUNCH)

# Clients of other people, where they are installed: pip install openai litellm langchain-openai.
test-faults: $(READY)
	@$(TESTS) -m faults -rs tests/faults tests/unit tests/ranks tests/system

# Installs nothing: what is missing is named, and its tests are reported as not run.
test-launch: $(READY)
	@$(LAUNCH)

test-gpu: $(READY)
	@$(BIN)/python -m pytest -m gpu tests/device

# the packages of this project with another megatron-core before its own
test-megatron: $(READY)
	@test -n "$(VERSION)" || { echo "error: which megatron-core? make test-megatron VERSION=0.19.2"; exit 1; }
	@$(BIN)/python -m lab.versions.environment $(VERSION) $(VENV)-megatron/$(VERSION) > /dev/null
	@$(VENV)-megatron/$(VERSION)/bin/python -m pytest -rs -m "not long" $(PYTEST_OPTIONS) $(MEGATRON_TESTS)

# before a release; the same command again continues where it was stopped, VERSIONS_OPTIONS="--only checkpoints" runs a part
test-versions: $(READY)
	@$(BIN)/python -m lab.megatron_versions --workers $(WORKERS) --tests "$(MEGATRON_TESTS)" $(VERSIONS_OPTIONS)

# torch_npu makes `import torch` fail where CANN is missing, so it has a virtual environment of its own, on top of .venv's packages
$(NPU_READY): $(READY) constraints.txt
	@$(BIN)/python -m venv --without-pip $(NPU_VENV)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	    $$($(NPU_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	@$(BIN)/python -m pip --python $(NPU_VENV)/bin/python install -q --disable-pip-version-check --no-deps \
	    torch_npu==$$(sed -n 's/^torch==//p' constraints.txt)
	@touch $(NPU_READY)

# NPU_VENV's packages with another megatron-core before them. Newer ones ask for Python 3.12, and run on 3.11.
$(NPU_VENV)-megatron/%/.ready: $(NPU_READY)
	@$(BIN)/python -m venv --without-pip $(@D)
	@$(BIN)/python -m pip --python $(@D)/bin/python install -q --disable-pip-version-check --no-deps \
	    --ignore-requires-python megatron-core==$*
	@for python in $(NPU_VENV) $(VENV); do $$python/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; done > \
	    $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/npu.pth
	@touch $@

# by default the oldest and the newest megatron-core for which the Ascend stack has a branch
test-npu: $(NPU_READY)
	@for version in $(or $(VERSION),$$($(BIN)/python -m tests.npu.versions)); do \
	    $(SELF) -s --no-print-directory $(NPU_VENV)-megatron/$$version/.ready && \
	    echo "tests/npu under megatron-core $$version" && \
	    NPU_TESTS_ON=simulation TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
	        $(NPU_VENV)-megatron/$$version/bin/python -m pytest -m "not long" $(NPU_TESTS) || exit 1; \
	done

# by default the newest vLLM that is tested; VLLM_TESTS="tests/vllm/test_texts.py -k preempted" runs a part
test-vllm: $(READY)
	@version=$(or $(VERSION),$$($(BIN)/python -c 'from megatron_sorted.platform.supported import VLLM_TESTED; print(VLLM_TESTED[-1])')); \
	    $(BIN)/python -m lab.vllm.environment $$version $(VLLM_VENV)/$$version > /dev/null && \
	    echo "$(VLLM_TESTS) under vLLM $$version" && \
	    VLLM_TESTS_ON=1 $(VLLM_VENV)/$$version/bin/python -m pytest -rs $(PYTEST_OPTIONS) $(VLLM_TESTS)

# on an Ascend host the Python that has torch_npu: make accept-npu PYTHON=...
ifeq ($(ON),simulation)
accept-npu: $(NPU_READY)
	@TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(NPU_VENV)/bin/python -m tests.support.npu_simulation $(NPU_VENV)/bin/python -m lab.accept_npu
else
accept-npu:
	@PYTHONPATH=$(CURDIR) $(PYTHON) -m lab.accept_npu
endif

# builds llama.cpp first; with MODEL=... QUESTIONS=... the strategies of that model too; CONTEST_OPTIONS=--tenth: in 20 minutes
contest: $(READY)
	@$(BIN)/python -m lab.build_llama_cpp
	@$(BIN)/python -m lab.contest $(MODEL) $(if $(QUESTIONS),--questions $(QUESTIONS)) $(CONTEST_OPTIONS)

bench: $(READY)
	@$(BIN)/python -m lab.bench
	@$(BIN)/python -m lab.bench_run
	@$(BIN)/python -m lab.bench_convert
	@$(BIN)/python -m lab.bench_rules
	@$(BIN)/python -m lab.bench_decoding

# SERVING_OPTIONS="--before DIR --llama-cpp FOLDER ...": beside an earlier version and the servers of others
bench-serving: $(READY)
	@test -n "$(MODEL)" -a -n "$(QUESTIONS)" || { echo "error: which model, which questions? make bench-serving MODEL=... QUESTIONS=questions.jsonl"; exit 1; }
	@$(BIN)/python -m lab.bench_serving $(MODEL) --questions $(QUESTIONS) $(SERVING_OPTIONS)

clean:
	rm -rf $(VENV) $(VENV)-megatron $(VLLM_VENV) $(NPU_VENV) $(NPU_VENV)-megatron runs build dist docs/_build docs/reference *.egg-info
