PYTHON ?= python3
CORES ?= $(shell nproc)
BIN := .venv/bin
INSTALLED := .venv/.installed
DOCS_INSTALLED := .venv/.docs-installed
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo -n)

.PHONY: setup demo test test-slow test-gpu test-faults test-slurm bench bench-peers bench-page docs site lint house clean

setup: $(INSTALLED)

# torch first and pinned exactly: asked for together with the rest, a looser choice brings gigabytes of CUDA packages
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)"
	$(BIN)/pip install --quiet --editable ".[workflow,dev]"
	touch $@

# one thread each: the sweep's points then train side by side, which is quicker than one after the other on all cores
demo: setup
	$(BIN)/snakemake --cores $(CORES) --set-threads train=1 train_half=1 generate=1
	@echo "Report: $(CURDIR)/results/demo/report.html"

# a worker for each core, each test file in one of them
PYTEST := $(BIN)/python -m pytest -n $(CORES) --dist loadscope --no-loadscope-reorder

test: setup
	$(PYTEST) -m "not slow"

# the trainings and whole runs that are left out above
test-slow: setup
	$(PYTEST) -m slow

# on a machine with a CUDA device
test-gpu: setup
	$(BIN)/python -m pytest tests/gpu --gpu

# each stage killed, interrupted, out of room, with inputs that fail under it; as root, disks are real ones
test-faults: setup
	$(PYTEST) tests/faults --faults

# a real one-node SLURM, as root, from Debian's packages (installed if they are missing); for a container or a CI machine
test-slurm: setup
	$(SUDO) tests/slurm/cluster.sh start
	$(BIN)/python -m pytest tests/slurm --slurm; status=$$?; $(SUDO) tests/slurm/cluster.sh stop; exit $$status

# minutes, on a machine with nothing else to do; BENCH="--device cuda" on one with a GPU
bench: setup
	$(BIN)/python benchmarks/bench.py $(BENCH)
	$(BIN)/python benchmarks/make_page.py

# cryoDRGN and hax-em beside ours, in environments of their own (5 GB, made once); BENCH="--particles 2000 --epochs 20"
bench-peers: setup
	$(BIN)/python benchmarks/bench_peers.py $(BENCH)
	$(BIN)/python benchmarks/make_page.py

bench-page: setup
	$(BIN)/python benchmarks/make_page.py

# the config's schema and reference, from the settings
docs: setup
	$(BIN)/python -m flexlib.workflow_support.schema --write

# the documentation as a site, in site/
$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

site: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(MAKE) --no-print-directory house
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint
	$(BIN)/python -m flexlib.workflow_support.schema --check

# sizes, circles, and what only one module may know; without conftest.py, which would import torch
house: setup
	$(BIN)/python -m pytest --noconftest --quiet --no-header --durations=0 --durations-min=5 tests/test_house.py

clean:
	rm -rf results resources logs .snakemake site
