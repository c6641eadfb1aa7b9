# make demo: the main job on built-in data. make test: every check of up to ten minutes. make proof: the slower checks. make quick:
# lint and the tests near a change. make mutations: that the tests of the CUDA kernels and of AMX catch
# planted faults. make sanitize: the operator tests on CPU kernels that watch their memory. make docs: the documentation, its
# examples run. make bench: every operator at one image against its peers (benchmarks/ops.py --quick, which checks that they
# agree first). make figures: every committed CPU measurement and the picture. make gpu: what only a CUDA device can show. make wheels: sdist and wheel, installed with the oldest and the newest torch. All set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch>=2.10
# Without a GPU the CUDA extension is only linked and imported: one architecture will do (tools/cuda_gate compiles for all).
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
$(VENV)/installed test proof: export TORCH_CUDA_ARCH_LIST ?= 8.0
endif

# Tests of GPU kernels: they compile what all workers would share, or start Triton in its interpreter.
KERNELS := cuda_on_cpu cuda_gate triton_interpreted triton_gate
TESTS := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal \
	$(addprefix --ignore=tests/,$(KERNELS))
INTERPRETED := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest
# The tests of the rooms that differ from main.
CHANGED ?= $(shell git diff --name-only main -- bkd_fast csrc tests)
ROOMS = $(shell printf '%s\n' $(CHANGED) | sed -E \
	's,^csrc/.*,ops,; s,^bkd_fast/benchmark/.*,benchmarks,; s,^(bkd_fast|tests)/(test_)?([^/.]+).*,\3,' | sort -u)
NEAR = $(wildcard $(foreach room,$(filter-out support $(KERNELS),$(ROOMS)),tests/$(room) tests/test_$(room).py))

.PHONY: demo test proof quick lint docs mutations sanitize bench figures gpu wheels clean

demo: $(VENV)/installed
	$(BIN)/bkd-fast demo --out runs/demo

test: $(VENV)/installed
	@echo "make test: about 10 minutes on 2 idle cores (make proof, the rest: about 45)"
	$(MAKE) lint
	$(TESTS) -m "not slow"
	$(BIN)/pytest -m "not slow" tests/cuda_on_cpu tests/cuda_gate tests/triton_gate
	$(INTERPRETED) -m "not slow" tests/triton_interpreted

# What is slower: long tests, compiled code of every architecture and configuration, and the CUDA kernels under sanitizers.
proof: $(VENV)/installed $(VENV)/include/onnxruntime
	@echo "make proof: about 45 minutes on 2 idle cores"
	$(TESTS) -m slow
	$(BIN)/pytest -m slow tests/cuda_gate tests/triton_gate
	$(INTERPRETED) -n 2 tests/triton_interpreted
	$(BIN)/python -m tools.cuda_on_cpu.sanitized
	CUDA_ON_CPU_ARCHITECTURE=750 $(BIN)/pytest tests/cuda_on_cpu -k "(with_the_reference and forward) or tiles"

# Lint, a smoke set, and the tests near a change, in less than 90 seconds.
quick: $(VENV)/installed
	$(MAKE) lint
	OMP_NUM_THREADS=1 timeout 70 $(BIN)/pytest -x -n 2 -m "not slow" \
		tests/test_config.py tests/test_house.py tests/test_files.py $(NEAR) \
		|| { [ $$? = 124 ] && echo "make quick: no failure within 70 seconds; make test runs the rest"; }

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent tools/consumer.py

docs: $(VENV)/installed
	$(BIN)/python -m sphinx -W --keep-going -q -b doctest docs docs/_build/doctest
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

mutations: $(VENV)/installed
	$(BIN)/python -m tools.cuda_on_cpu.mutations
	MUTATIONS=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/amx_on_cpu -k planted

sanitize: $(VENV)/installed
	$(BIN)/python -m tools.sanitize

bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench]"
	$(BIN)/python benchmarks/ops.py --quick

# Every committed CPU table and the picture, of one commit: about 15 minutes on 2 idle cores.
figures: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench]"
	$(BIN)/python benchmarks/all.py

# What only a CUDA device can show, 35 minutes at most; the parts can also run one by one (benchmarks/gpu.py).
gpu: $(VENV)/installed
	status=0; for part in 1 2 3 4; do $(BIN)/python benchmarks/gpu.py --part $$part --out runs/gpu || status=1; done; exit $$status

wheels: $(VENV)/installed
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m tools.wheels

# Torch and the build tools come first; the package is then built without isolation, with just these.
$(VENV)/installed: pyproject.toml setup.py $(wildcard bkd_fast/extension/*.py) $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet "$(TORCH)" torchvision
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[anomalib,demo,docs,examples,export,int8,mlflow,ray,test,wandb]"
	touch $@

# For the C++ program of docs/deploy.md; its test is skipped where npm cannot fetch them.
$(VENV)/include/onnxruntime: | $(VENV)/installed
	$(BIN)/python -m tools.onnxruntime_headers $@ || echo "ONNX Runtime's headers are not here: one test is skipped"

clean:
	rm -rf $(VENV) build docs/_build runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
