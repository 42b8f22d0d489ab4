# Every target does its own set-up; once .venv is whole that takes a fraction of a second and no network.
# `make PYTHON=python3.12 setup` chooses the interpreter; with none given an existing .venv keeps its own.
PYTHON ?= $(firstword $(wildcard .venv/bin/python) python3)
RUN := .venv/bin/python

.PHONY: setup demo test test-all lint types bench bench-all docs

setup:
	@command -v $(PYTHON) >/dev/null || { \
		echo "setup: Python must be installed; $(PYTHON) was not found. Use make PYTHON=python3.12 or another." >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))" || { \
		echo "setup: Python must be 3.10 to 3.13; got $$($(PYTHON) -V 2>&1). Use make PYTHON=python3.12 or another." >&2; exit 1; }
	@$(PYTHON) tools/setup_environment.py

# OpenMP's threads spin while they wait for one another: with another program on the same cores a step of the demo
# then takes 1 to 30 times as long. This spin bounds it to about 4 times and costs nothing measurable on idle cores;
# a much shorter one (1,000) bounds it to 1.5 times, but costs 1.4 times on idle cores.
demo: export GOMP_SPINCOUNT = 20000
demo: setup
	$(RUN) tools/demo.py

test: lint types
	$(RUN) -m pytest -n 2 --dist loadfile

test-all: lint types
	$(RUN) -m pytest -n 2 --dist loadfile -m ""

lint: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	.venv/bin/lint-imports

types: setup
	$(RUN) -m mypy

# Large tensors stay with malloc; otherwise the kernel's mapping of memory is timed.
bench bench-all: export GOMP_SPINCOUNT = 1000
bench bench-all: export MALLOC_MMAP_MAX_ = 0
bench bench-all: export MALLOC_TRIM_THRESHOLD_ = 4294967296
bench bench-all: export MALLOC_TOP_PAD_ = 67108864

bench: setup
	$(RUN) -m bench --json output/bench.json --plot output/bench.png

# The slow claims, too: steps of whole detectors, population statistics, the evaluation, whole runs.
bench-all: setup
	$(RUN) -m bench --all --json output/bench_all.json --plot output/bench_all.png
	$(RUN) -m bench.population_statistics
	$(RUN) -m bench.evaluation_speed
	$(RUN) -m bench.whole_runs

# The site opens from the file system: output/docs/index.html.
docs: setup
	$(RUN) -m sphinx -W --keep-going -q -b html -d build/docs-cache docs output/docs
	@echo "output/docs/index.html"
