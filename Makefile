# One environment in .venv for everything; made by the first target that needs it.
#
#   make demo        train the demonstration (minutes on two cores)
#   make demo-full   every arm and seed of the committed results (hours)
#   make test        tests without `slow` and `gpu`; make test-all has them all
#   make lint        formatting, lint and types; make format repairs the first two
#   make clean       remove the environment and caches (results in runs/ stay)
#
# Variables: PYTHON=python3.11   the interpreter that creates .venv
#            TORCH_INDEX_URL=... index to install torch from (e.g. CPU-only wheels)
#            WHEELS=DIR          folder or page of wheels to look into first
#            JOBS=2              processes that run the tests

PYTHON ?= python3.11
TORCH_INDEX_URL ?=
WHEELS ?=
JOBS ?= 2

# Ray is large and needed by `slow` tests only.
EXTRAS := maniskill,plot,wandb,tensorboard,hydra,remote,openvla,octo,rlds,finetune,dev
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
FIND_LINKS := $(if $(WHEELS),--find-links "$(WHEELS)")
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)")
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(FIND_LINKS)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-full test test-all lint format clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

install: $(INSTALLED)

# Torch comes first and alone, so that its index is asked for nothing else and no
# other package's requirement can pick another version.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "$(PYTHON) not found: install Python 3.11 or set PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || { echo "[1/3] creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "[2/3] installing torch $(TORCH)"
	@$(PIP) $(TORCH_INDEX) "torch==$(TORCH)"
	@echo "[3/3] installing torchrl_rpd, the simulator and the tools"
	@$(PIP) -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python examples/demo.py

demo-full: $(INSTALLED)
	@$(BIN)/python -m benchmarks.demo_full

test: $(INSTALLED)
	@$(BIN)/python -m pytest -rfEs -n $(JOBS) --dist loadfile -m "not slow and not gpu"

test-all: $(INSTALLED)
	@$(PIP) -c constraints.txt -e ".[$(EXTRAS),ray]"
	@$(BIN)/python -m pytest -rfEs

lint: $(INSTALLED)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(INSTALLED)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
