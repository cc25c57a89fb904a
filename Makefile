# One environment (.venv), one command per job. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1
export DS_ACCELERATOR ?= cpu
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help env demo test smoke parity faults checks audit format clean-demo
help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(VENV)/.installed ## Create .venv and install the package with pinned versions
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "spatialvlm needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel -c constraints.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e ".[dev]"
	touch $@

demo: env ## Rooms -> stage 1 -> stage 2 -> held-out evaluation -> runs/demo/report.html
	bash tools/demo.sh

test: env ## Unit, repository and fast recipe tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q -m "not (slow or fault or parity or smoke or gpu or weights)"

smoke: env ## Shipped recipes with one and two processes (DeepSpeed on CPU included)
	$(BIN)/python -m pytest -q -m "smoke"

parity: env ## Slow comparisons against references; rewrites docs/parity.md
	$(BIN)/python -m pytest -q -m "parity"

faults: env ## Kills, corruption, mixed modalities across processes
	$(BIN)/python -m pytest -q -m "fault"

checks: env ## Lint, types, import layers, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/interrogate -q spatialvlm

audit: ## Known vulnerabilities of the pinned packages; needs a network, says so without one
	@test -x .cache/audit/bin/pip-audit || { $(PYTHON) -m venv .cache/audit && .cache/audit/bin/pip install -q pip-audit; }
	@.cache/audit/bin/pip-audit --no-deps --disable-pip -r constraints.txt \
	  || echo "audit: vulnerabilities above, or no advisory service could be reached"

format: env ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean-demo: ## Remove the demo's data and runs
	rm -rf data/demo runs/demo
