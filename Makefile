# Everything that a developer or a first visitor runs. `make help` lists it.
#
# PYTHON may name any Python from 3.11: make demo PYTHON=/usr/bin/python3.12
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
# More than there are cores: tests wait for limits, kernels and servers most of their time.
WORKERS ?= $(shell expr $$(nproc) + 2)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-upstream attacks compare lint format bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 22

setup: $(VENV)/.ready ## make .venv with everything in it

# A Python without ensurepip (Debian's, as it comes) makes a venv without pip; virtualenv brings its own.
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. Try: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@umask 022; rm -rf $(VENV); \
	$(PYTHON) -m venv $(VENV) 2>/dev/null || $(PYTHON) -m virtualenv -q $(VENV) || \
	  { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; } || \
	  { echo "No venv can be made with $(PYTHON): install python3-venv (apt-get install python3-venv)." >&2; exit 1; }
	@umask 022; $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[demo,service,test,lint]'
	@touch $@

demo: setup ## grade the example course: honest, careless and hostile students
	@$(BIN)/python examples/course/demo.py

.PHONY: demo-service
demo-service: setup ## the same, graded by a grading service that is started on this machine
	@$(BIN)/python examples/course/demo.py --service

test: lint test-all test-upstream ## lint, every test, nbgrader's own autograde tests

.PHONY: test-all
test-all: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests

test-upstream: setup ## nbgrader's own autograde and exchange tests against this plugin
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/upstream/run.py

attacks: setup ## every attack of the threat catalogue, as a table
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m threat --threat-table --every-start tests/attacks tests/isolate \
	  tests/nbgrader_aalto tests/grader_service

compare: setup ## the same attacks against bwrap and chroot, where installed (as root)
	@$(BIN)/python tests/attacks/compare.py

.PHONY: test-vm
test-vm: setup ## stock kernels of Debian in virtual machines (needs qemu-system-x86); VM="--only-look" for less
	@$(BIN)/python tests/vm/run.py $(VM)

lint: setup ## ruff format, ruff check, mypy --strict
	@$(BIN)/ruff format --check -q . && $(BIN)/ruff check -q . && $(BIN)/mypy isolate grader_service nbgrader_aalto

format: setup ## let ruff write the format
	@$(BIN)/ruff format -q . && $(BIN)/ruff check -q --fix .

FUZZ_EXAMPLES ?= 50000
.PHONY: fuzz soak bench-sandbox bench-exchange
fuzz: setup ## what a driver room can send, for hours; FUZZ_EXAMPLES=50000 of each kind
	@FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q -n $(WORKERS) tests/isolate/test_fuzz.py

SOAK ?= 2000
soak: setup ## SOAK=2000 sandboxes ended in every way; what the host has before and after
	@$(BIN)/python tests/isolate/soak.py --sandboxes $(SOAK)

bench: setup bench-sandbox bench-warm ## time to grade, beside stock nbgrader, in the same run
	@$(BIN)/python benchmarks/autograde.py
	@$(BIN)/python benchmarks/autograde.py --students 300 --rounds 1
	@$(BIN)/python benchmarks/bolt.py

bench-sandbox: setup ## time and memory of a sandbox, beside bubblewrap and beside none
	@$(BIN)/python benchmarks/sandbox.py

.PHONY: bench-warm
bench-warm: setup ## warm kernels: time to the first cell and memory, beside a stock kernel
	@$(BIN)/python benchmarks/warm.py

bench-exchange: setup ## 500 submissions at once while an instructor collects, beside stock (as root)
	@$(BIN)/python benchmarks/exchange.py

.PHONY: bench-service
bench-service: setup ## the grading service: accepting, dispatching, memory, beside none; SQLite and PostgreSQL
	@$(BIN)/python benchmarks/service.py

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
