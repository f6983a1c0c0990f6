# What a person does with a checkout, one word each; `make` alone lists the words.
# Needs make and Python 3.11 or newer with its venv module. Everything is installed inside the checkout.

VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run test test-compiled fuzz verify bench vllm format constraints clean check-style

help: ## list these words
	@sed -n 's/^\([a-z-]*\):.*## /  make \1#/p' $(MAKEFILE_LIST) | awk -F'#' '{printf "%-18s %s\n", $$1, $$2}'

run: $(VENV)/.runtime ## install, then start `tidegate demo` (rush hour: make run ARGS=--traffic)
	@exec $(BIN)/tidegate demo $(ARGS)

test: check-style ## style, types and the tests of this machine (one file: make test ARGS=tests/proxy/test_x.py)
	@$(BIN)/pytest -m "not slow" $(ARGS)

test-compiled: build/compiled/.stamp ## the same over real sockets, with the data path compiled (hatch_build.py)
	@PYTHONPATH=$(CURDIR)/build/compiled $(BIN)/pytest --import-mode=append -m "not slow and not vllm" \
	  tests/e2e $(COMPILED_TESTS) $(ARGS)

FUZZ_SECONDS ?= 30
fuzz: $(VENV)/.fuzz ## feed the parsers what a fuzzer makes up, each for FUZZ_SECONDS (30)
	@$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(ARGS)

verify: check-style vllm test-compiled $(VENV)/.fuzz ## all tests, with real models and promised times, then fuzzing, crashes, memory, delay and a soak (two hours)
	@TIDEGATE_FORBID_SKIPS=1 TIDEGATE_PATIENCE=1 $(BIN)/pytest $(ARGS)
	@TIDEGATE_FORBID_SKIPS=1 $(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)
	@$(BIN)/python -m benchmarks.crash --no-result
	@$(BIN)/python -m benchmarks.memory --check --no-result
	@$(BIN)/python -m benchmarks.delay --check --no-result
	@$(BIN)/python -m benchmarks.soak --check --no-result

bench: $(VENV)/.dev ## what a request and a token cost, side by side with other proxies (half an hour)
	@$(BIN)/python -m benchmarks.install_peers
	@$(BIN)/python -m benchmarks.compare $(ARGS)

vllm: $(VENV)/.dev ## install a real vLLM for the CPU and two small models into .vllm, for the tests (2.5 GB)
	@$(BIN)/python tests/e2e/install_vllm.py $(ARGS)

format: $(VENV)/.dev ## format the code and mend what can be mended
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

constraints: ## write constraints.txt anew: the newest versions that pyproject.toml allows
	@rm -rf build/newest && $(MAKE) --no-print-directory VENV=build/newest build/newest/.python
	@build/newest/bin/python -m pip install --quiet --upgrade pip
	@build/newest/bin/python -m pip install --quiet hatchling editables --group dev --group fuzz --editable .
	@{ echo "# Exact versions for every installation; 'make constraints' writes this file."; \
	   build/newest/bin/python -m pip freeze --all --exclude-editable --exclude setuptools; } > build/constraints.txt
	@mv build/constraints.txt constraints.txt && rm -rf build/newest

clean: ## remove what was installed and made, except state and ledgers
	rm -rf $(VENV) .vllm .peers build .pytest_cache .mypy_cache .ruff_cache .hypothesis

check-style: $(VENV)/.dev
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

# Stamps: each is newer than all it was made of, so a second call starts at once.

$(VENV)/.python:
	@for python in $(PYTHON) python3 python python3.14 python3.13 python3.12 python3.11; do \
	    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "make: needs Python 3.11 or newer, found `python3 -V 2>&1`; name one with make PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "make: $$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	[ -x $(BIN)/python ] || { echo "installing into $(VENV) ..."; $$python -m venv $(VENV); }
	@touch $@

$(VENV)/.pip: $(VENV)/.python constraints.txt
	@$(INSTALL) --upgrade pip
	@touch $@

$(VENV)/.runtime: $(VENV)/.pip pyproject.toml
	@TIDEGATE_COMPILE=0 $(INSTALL) --build-constraint constraints.txt --editable '.[demo]'
	@touch $@

# What reads bytes, where mypyc has its own ideas of a slice; no test among them that replaces a part of a module.
COMPILED_TESTS := $(addprefix tests/proxy/test_,http1_cuts.py http1_oracles.py http1_requests.py http1_responses.py repeated.py \
  meter.py meter_captures.py openai.py multipart.py websocket.py) tests/policies/test_registry.py tests/sim/test_engine.py
SOURCES := $(wildcard proxy/*.py proxy/*/*.py policies/*.py probes/*.py sim/*.py)
build/compiled/.stamp: $(VENV)/.dev hatch_build.py pyproject.toml $(SOURCES)
	@echo "compiling the data path ..."
	@rm -rf build/compiled
	@TIDEGATE_COMPILE=1 $(INSTALL) --build-constraint constraints.txt --no-deps --target build/compiled .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@$(INSTALL) --group dev
	@touch $@

# Atheris is not there for every system: without it, `tests.fuzz` says what was not run.
$(VENV)/.fuzz: $(VENV)/.dev
	@$(INSTALL) --group fuzz && touch $@ || true
