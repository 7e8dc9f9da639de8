# `make demo` and `make test` work as the first command on a fresh machine: both create .venv first.
.DEFAULT_GOAL := help
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/.peers
OUTPUT ?= runs/demo
SEED ?= 0

# Several torch processes on few cores: idle threads must sleep, not spin. One alone takes 2.5 times as long to sample so.
test test-slow mutants: export OMP_WAIT_POLICY ?= PASSIVE
# Shapes in the tests are tiny: more threads make them slower.
test test-slow mutants: export OMP_NUM_THREADS ?= 1
# Many tests start a Python of their own: it finds the sources compiled.
test test-slow mutants: export PYTHONDONTWRITEBYTECODE =
# Where there is a GPU they would train on it, in bfloat16, which is not what they expect.
test test-slow mutants: export CUDA_VISIBLE_DEVICES =

.PHONY: help demo demo-base readme test test-slow test-gpu bench bench-gpu mutants lint format format-check typecheck check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): requirements.txt pyproject.toml scripts/setup_env.sh
	@scripts/setup_env.sh

demo: $(READY)  ## the whole pipeline on generated clips, on a CPU or a GPU; SEED=0 OUTPUT=runs/demo
	$(BIN)/fastr1 demo --output-dir $(OUTPUT) --seed $(SEED)

demo-base: $(READY)  ## train a base model for the demo from nothing, 37 minutes; OUTPUT=runs/demo
	$(BIN)/python -m fastr1.demo.pretrain --output-dir $(OUTPUT)/base_model

readme: $(READY)  ## the measured numbers and the chart of README.md, from the rows in bench/results
	$(BIN)/python scripts/render_readme.py

test: $(READY)  ## the CPU tests, in two processes
	@# Every file in one of them, in the order of the names: the longest tests do not come last.
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)  ## CPU tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: $(READY)  ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

$(PEERS): $(READY)
	@# The libraries that the benches compare with; without them their rows say so.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[bench]'
	@touch $@

bench: $(PEERS)  ## losses, loading, rollouts and updates against others, 6 minutes on 2 cores; rows into bench/results, table into the README
	@# Without -m, three minutes: less of loading, rollouts and updates, and without the slowest providers.
	$(BIN)/python -m pytest tests/losses/test_compat_*.py
	$(BIN)/python -m pytest bench --benchmark-only -m "not gpu"
	$(BIN)/python bench/report.py

bench-gpu: $(PEERS)  ## the same with the shapes of a large GPU: cold and warm cache, dead rows, first calls, targets
	@# Providers may take many minutes each. What was measured is reported where one of them failed, too.
	$(BIN)/python -m pytest bench --benchmark-only --full -m "slow or not slow" --timeout 3600; code=$$?; \
	$(BIN)/python bench/report.py && exit $$code

mutants: $(READY)  ## does a wrong sign, mask or scale in the losses turn their tests red? about 10 minutes
	$(BIN)/python scripts/mutants.py

lint: $(READY)  ## ruff
	$(BIN)/ruff check .

format: $(READY)  ## rewrite the sources: import order and layout
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

format-check: $(READY)
	$(BIN)/ruff format --check .

typecheck: $(READY)  ## mypy
	$(BIN)/mypy

check:  ## exactly what continuous integration runs: lint, layout, types, tests
	.ci/run

clean:  ## remove caches; keeps .venv and runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis build *.egg-info
	find fastr1 kernels tests scripts bench -name __pycache__ -type d -prune -exec rm -rf {} +
