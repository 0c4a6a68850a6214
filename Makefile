# Each target does its own set-up: `make demo` and `make test` work on a fresh machine with Python and make alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-faults test-fast test-int8 lint check campaign-prepare campaign-cache campaign-train campaign-methods campaign-ray campaign-demo bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "ftk needs Python 3.11 to 3.13, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/ftk demo

# Each process takes a whole group of tests (`group_of` in tests/conftest.py); contract/ and e2e/, which take longest, come first.
# One more than two cores: a quarter of the time a process waits for others that it has started, killed or stopped.
PROCESSES ?= 3
PYTEST = $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadgroup --no-loadscope-reorder

test: setup
	$(PYTEST)

# What waits more than it computes: kills, damaged files, networks that fail, several processes, clusters.
test-faults: setup
	$(PYTEST) -m "faults and not campaign"

test-fast: setup
	$(PYTEST) -m "not campaign and not benchmarks and not faults"

# Beside the environment, not in it: diffusers and PEFT import torchao wherever it is installed, a second at each start.
test-int8: setup
	test -d $(VENV)/int8 || $(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/int8 torchao==0.18.0
	PYTHONPATH=$(VENV)/int8 $(BIN)/python -m pytest -q tests/unit/test_placement.py tests/unit/test_optim.py \
		tests/unit/test_optimizer_state.py tests/e2e/test_training.py -k "int8 or 8 or memory"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test test-faults

campaign-prepare: setup
	$(BIN)/python -m pytest -q -s -m campaign tests/e2e/test_prepare_faults.py

campaign-cache: setup
	$(BIN)/python -m pytest -q -s -m campaign tests/e2e/test_cache_faults.py tests/e2e/test_cache_engines.py

campaign-train: setup
	$(BIN)/python -m pytest -q -s -m campaign tests/e2e/test_train_faults.py

campaign-methods: setup
	$(BIN)/python -m pytest -q -m campaign tests/contract tests/unit/test_methods_controlnet.py

campaign-ray: setup
	$(BIN)/python -m pytest -q -m campaign tests/unit/test_ray_engine.py tests/e2e/test_prepare_engines.py

campaign-demo: setup
	$(BIN)/python -m pytest -q -s -m campaign tests/e2e/test_demo.py

bench: setup
	$(BIN)/python benchmarks/train_step.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
