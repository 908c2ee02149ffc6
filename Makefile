# make demo | test | lint | bench | wheels | wheels-check | clean. Everything lives in .venv and .cache inside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= $(shell nproc)

.PHONY: setup demo test lint format bench wheels wheels-check clean

# torch first and pinned: a free choice would bring gigabytes of GPU libraries to a machine that may have no GPU.
# Where there is nvcc, the CUDA kernels are built for one architecture: the wheels have them all.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt MANIFEST.in $(wildcard csrc/building/*.py csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-9.0+PTX}" \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

setup: $(VENV)/.ready

demo: setup
	$(BIN)/rlhf-fast demo $(ARGS)

# The GPU kernels are tested on the CPU, on all cores; Triton's interpreter needs a process of its own. Last, whether these tests
# notice what can be taken away from a kernel.
test: setup
ifeq ($(ARGS),)
	$(BIN)/python -m pytest --ignore=tests/gpu
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/gpu
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/gpu/interpreter
	cd tests && ../$(BIN)/python -m gpu.tools.mutate
else
	$(BIN)/python -m pytest $(ARGS)
endif

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp')
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp')

# Peers without their dependencies: they would bring other versions of torch and transformers.
$(VENV)/.peers: $(VENV)/.ready bench/peers.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r bench/peers.txt
	touch $@

bench: setup $(VENV)/.peers
	mkdir -p runs/bench
	$(BIN)/rlhf-fast bench --peers --json runs/bench/bench.json --markdown runs/bench/bench.md --plot runs/bench/roofline.png $(ARGS)
	$(BIN)/python bench/overhead.py
	$(BIN)/python bench/memory.py

# The source archive, dist/cpu and dist/cuda; the CUDA compilers come into .cache (500 MB).
wheels: setup
	PYTHONPATH=csrc $(BIN)/python -m building.wheels $(ARGS)

wheels-check: wheels
	RLHF_FAST_DIST=dist $(BIN)/python -m pytest tests/wheels $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info rlhf_fast/_cpu*.so rlhf_fast/_cuda*.so
