# make demo: the main job on built-in data. make test: every check. make sanitize: the operator tests on kernels that
# watch their memory. make bench: every operator at one image against its peers (benchmarks/ops.py --quick, which checks
# that they agree first). All set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint sanitize bench clean

demo: $(VENV)/installed
	$(BIN)/bkd-fast demo --out runs/demo

test: $(VENV)/installed lint
	$(BIN)/pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: $(VENV)/installed
	$(BIN)/python tests/sanitize.py

bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench]"
	$(BIN)/python benchmarks/ops.py --quick

# Torch and the build tools come first; the package is then built without isolation, with just these.
$(VENV)/installed: pyproject.toml setup.py bkd_fast/_build.py $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet "torch>=2.10" torchvision
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[demo,test]"
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
