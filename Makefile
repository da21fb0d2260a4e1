# `make quickstart` shows the toolbox at work; `make test` runs every check. Both set up `.venv` first.
# `make docs` builds the pages into build/docs.
# `make test-oldest` runs the tests on the oldest supported PyTorch, in an environment of its own.
PYTHON ?= python3
BIN := .venv/bin

# Sized for a few minutes on two cores; the recipe itself is for real pictures.
QUICKSTART := --set resize.short=160 --set resize.long=224 --set scale_jitter=none --set epochs=3 \
	--set images_per_device=2 --set optimizer.lr=0.008 --set model.box.num_sampled=64

# The oldest PyTorch that pyproject.toml allows, and the torchvision of its release.
OLDEST := torch==2.11.0 torchvision==0.26.0

.PHONY: quickstart test test-oldest lint format docs clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

shapes: | .venv/installed
	$(BIN)/boxwright data shapes shapes

quickstart: shapes
	$(BIN)/boxwright train faster_rcnn_r18_fpn_small --data shapes --out runs/quickstart --resume $(QUICKSTART)
	$(BIN)/boxwright test runs/quickstart --data shapes
	@echo "Look at runs/quickstart/report.html"

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadgroup

.venv-oldest/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet $(OLDEST) --editable '.[dev]'
	touch $@

# Not part of CI: another PyTorch takes minutes to install.
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest --numprocesses 2 --dist loadgroup

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/installed
	$(BIN)/python docs/make_reference.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "Open build/docs/index.html"

clean:
	rm -rf .venv .venv-oldest build shapes runs
