# One environment in .venv for everything; made by the first target that needs it.
#
#   make install     the environment alone
#   make demo        train the demonstration (minutes on two cores)
#   make demo-vla    the same from pictures: the pocket VLA teaches, the student sees 80 pixels
#   make demo-full   every arm and seed of the committed results (hours)
#   make bench       measure the speed again, for benchmarks/results
#   make test        tests without `slow` and `gpu`; make test-all has them all
#   make coverage    make test, and how much of torchrl_rpd the tests ran
#   make lint        formatting, lint and types; make format repairs the first two
#   make docs        the documentation, in docs/_build/html, and its examples run;
#                    a warning is an error
#   make wheel       the wheel, in dist/
#   make check-wheel the wheel in an empty environment, newest and minimum torchrl
#   make clean       remove the environment and caches (results in runs/ stay)
#
# Variables: PYTHON=python3.11   the interpreter that creates .venv
#            TORCH_INDEX_URL=... index to install torch from (e.g. CPU-only wheels)
#            WHEELS=DIR          folder or page of wheels to look into first
#            JOBS=2              processes that run the tests
#            COVERAGE=1          make test measures which lines ran

PYTHON ?= python3.11
TORCH_INDEX_URL ?=
WHEELS ?=
JOBS ?= 2
COVERAGE ?=

# Ray is large and needed by `slow` tests only.
EXTRAS := maniskill,plot,wandb,tensorboard,hydra,remote,openvla,octo,rlds,finetune,docs,dev
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
FIND_LINKS := $(if $(WHEELS),--find-links "$(WHEELS)")
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)")
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check $(FIND_LINKS)
PIP := $(BIN)/python $(PIP_INSTALL)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-vla demo-full bench test test-all coverage lint format docs wheel \
    check-wheel clean

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

# A short version of benchmarks/study_groups.py's vla_push_cube.
demo-vla: $(INSTALLED)
	@$(BIN)/python examples/rpd.py preset=pixels task=push_cube reward=sparse teacher=pocket \
	    student=rgb frames=38400 episodes=100 checkpoint.every=null name=demo_vla
	@$(BIN)/python examples/report.py runs/demo_vla --out runs/demo_vla/report

demo-full: $(INSTALLED)
	@$(BIN)/python -m benchmarks.demo_full

bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks.speed

test: $(INSTALLED)
	@$(BIN)/python -m pytest -rfEs -n $(JOBS) --dist loadfile -m "not slow and not gpu" \
	    $(if $(COVERAGE),--cov --cov-report=)

test-all: $(INSTALLED)
	@$(PIP) -c constraints.txt -e ".[$(EXTRAS),ray]"
	@$(BIN)/python -m pytest -rfEs

coverage:
	@$(MAKE) --no-print-directory test COVERAGE=1
	@$(BIN)/python .ci/check_coverage.py

lint: $(INSTALLED)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(INSTALLED)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# One thread: the tutorials run small models, beside worker processes.
docs: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html
	@OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -b doctest \
	    -d docs/_build/html/.doctrees docs docs/_build/doctest
	@echo "docs: $$(find docs/_build/html -name '*.html' | wc -l) pages, no warning"

# What an earlier build left in build/ would be packed as well.
wheel: $(INSTALLED)
	@rm -rf build dist
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	@ls dist/*.whl

check-wheel: wheel
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_INDEX='$(TORCH_INDEX)' \
	    PIP_INSTALL='$(PIP_INSTALL)' .ci/check-wheel dist/*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache \
	    .coverage .coverage.* docs/_build docs/auto_tutorials docs/*/generated
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
