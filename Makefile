PYTHON ?= python3
CORES ?= $(shell nproc)
BIN := .venv/bin
INSTALLED := .venv/.installed
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo -n)

.PHONY: setup demo test test-gpu test-slurm bench bench-page docs lint clean

setup: $(INSTALLED)

# torch first and pinned exactly: asked for together with the rest, a looser choice brings gigabytes of CUDA packages
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)"
	$(BIN)/pip install --quiet --editable ".[workflow,dev]"
	touch $@

# one thread each: the sweep's points then train side by side, which is quicker than one after the other on all cores
demo: setup
	$(BIN)/snakemake --cores $(CORES) --set-threads train=1 generate=1
	@echo "Report: $(CURDIR)/results/demo/report.html"

test: setup
	$(BIN)/python -m pytest

# on a machine with a CUDA device
test-gpu: setup
	$(BIN)/python -m pytest tests/gpu --gpu

# a real one-node SLURM, as root, from Debian's packages (installed if they are missing); for a container or a CI machine
test-slurm: setup
	$(SUDO) tests/slurm/cluster.sh start
	$(BIN)/python -m pytest tests/slurm --slurm; status=$$?; $(SUDO) tests/slurm/cluster.sh stop; exit $$status

# minutes, on a machine with nothing else to do; BENCH="--device cuda" on one with a GPU
bench: setup
	$(BIN)/python benchmarks/bench.py $(BENCH)
	$(BIN)/python benchmarks/make_page.py

bench-page: setup
	$(BIN)/python benchmarks/make_page.py

# the config's schema and reference, from the settings
docs: setup
	$(BIN)/python -m flexlib.workflow_support.schema --write

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m flexlib.workflow_support.schema --check
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

clean:
	rm -rf results resources logs .snakemake
