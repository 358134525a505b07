# Everything happens in .venv beside this file; nothing is installed elsewhere.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two workers suit two cores; daemons of one test stay on one worker (see tests/conftest.py).
WORKERS ?= 2
PYTEST := BLYAN_ENV=test BLYAN_TEST_MODE=true OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest
# What `make check` tests: `all`, or `long` to test only what `make test` leaves out.
SUITE ?= all

.DEFAULT_GOAL := help
.PHONY: help venv demo test check lint format bench constraints clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 22

venv: $(STAMP) ## Make the environment

$(STAMP): pyproject.toml constraints.txt
	@.ci/find-python "$(PYTHON)" > /dev/null
	@[ -x $(BIN)/python ] || "$$(.ci/find-python "$(PYTHON)")" -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes a few minutes (PyTorch is large)."
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# libp2p brings trio-typing, whose stubs of an old trio would shadow the types that trio itself has.
	@rm -rf $(VENV)/lib/python3*/site-packages/trio-stubs $(VENV)/lib/python3*/site-packages/outcome-stubs
	@touch $@

demo: $(STAMP) ## Four daemons, one model, three questions
	@$(BIN)/python -m blyan_node.testnet.demo

test: $(STAMP) ## Run the default suite (below 12 minutes on two cores)
	$(PYTEST) -n $(WORKERS) --dist loadgroup

check: lint ## Format, lint, types, then all tests
ifeq ($(SUITE),long)
	$(PYTEST) -n $(WORKERS) --dist loadgroup -m long
else
	$(PYTEST) -n $(WORKERS) --dist loadgroup -m 'not benchmark'
endif

lint: $(STAMP) ## Format check, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## Measure; takes the machine for itself
	$(BIN)/python -m benchmarks

constraints: $(STAMP) ## Pin what .venv holds now, and remake requirements-test.txt
	$(BIN)/python .ci/pin.py

clean: ## Remove the environment and all caches
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* htmlcov report.html \
	       .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find blyan_node tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
