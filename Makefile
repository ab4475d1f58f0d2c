# Every target sets up what it needs, in .venv; nothing has to be installed by hand but Python (3.10 or newer).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check bench clean

demo: $(READY)  ## unlabelled images -> pretraining -> fine-tuning -> report.html, in minutes on two CPU cores
	$(BIN)/python examples/demo.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/selective_search.py
	$(BIN)/python benchmarks/memory.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/detr.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/eigen.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evaluation.py --images 1000

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo
