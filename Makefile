# `make quickstart` shows the toolbox at work; `make test` runs every check. Both set up `.venv` first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint format clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

quickstart: .venv/installed
	$(BIN)/boxwright data shapes shapes
	$(BIN)/boxwright train shapes_quickstart --data shapes --out runs/quickstart --overwrite
	$(BIN)/boxwright test runs/quickstart --data shapes
	@echo "Open runs/quickstart/report.html"

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadgroup

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv shapes runs
