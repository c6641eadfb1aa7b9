# make demo: the main job on built-in data. make test: every check. Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/bkd-fast demo --out runs/demo

test: $(VENV)/installed lint
	$(BIN)/pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The build tools come first, so that the package is compiled against the very torch it will run with.
$(VENV)/installed: pyproject.toml $(wildcard setup.py csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet "torch>=2.10" torchvision
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[demo,test]"
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
