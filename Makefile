# A fresh machine needs Python >= 3.11 and make. Everything is installed into .venv; nothing else is touched.
# Settings pass through: `make serve LATCH_PORT=9000`. Another Python: `make serve PYTHON=python3.12`.

PYTHON ?= python3
RUNTIME ?= cpu
BUILD_FLAGS ?=
MINUTES ?= 10
SEED ?= 1

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip --quiet --disable-pip-version-check install
SERVICE := .venv/.service-installed
ALL := .venv/.all-installed

.DEFAULT_GOAL := help
.PHONY: help serve check demo setup test lint faults bench bench-training train image lock clean

help:  ## Say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target text; do printf '%-21s %s\n' "$$target" "$$text"; done

serve: $(SERVICE)  ## Install the service with the CPU runtime and serve models/ on 127.0.0.1:8000
	@exec $(BIN)/latch serve

check: $(SERVICE)  ## Load every model of models/ and replay its golden vectors
	@$(BIN)/latch check

demo: $(SERVICE)  ## Play a chorale through the running service (`make serve`, in another terminal)
	@$(BIN)/latch demo

setup: $(ALL)  ## Install everything: service, training, tools

test: $(ALL)  ## Install everything and run the tests; ARGS="-k batch" goes to pytest
	$(BIN)/python -m pytest $(ARGS)

faults: $(ALL)  ## Kill, cut and fill real processes under load for MINUTES, by SEED, and write benchmarks/faults.md
	FAULTS_MINUTES=$(MINUTES) FAULTS_SEED=$(SEED) FAULTS_REPORT=benchmarks/faults.md \
	  $(BIN)/python -m pytest tests/faults -m faults $(ARGS)

lint: $(ALL)  ## Style, types and the walls between the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(ALL)  ## Measure the service beside its limits and write benchmarks/results.md; ARGS="doors --quick" for a part
	$(BIN)/python -m benchmarks $(ARGS)

bench-training: $(ALL)  ## Measure training's kernels beside torch.nn.GRU and write benchmarks/training.md
	$(BIN)/python -m benchmarks.training $(ARGS)

train: $(ALL)  ## Train the shipped models again and export them to models/
	$(BIN)/latch-train ship

image:  ## Build the container image latch:cpu, or latch:gpu with RUNTIME=gpu
	docker build $(BUILD_FLAGS) --build-arg RUNTIME=$(RUNTIME) --tag latch:$(RUNTIME) .

lock:  ## Resolve requirements/ again from pyproject.toml
	@PYTHON=$(PYTHON) bash requirements/lock.sh

clean:  ## Remove .venv and everything else that was built
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find service training tests models -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv writes: where it is missing, the environment is missing or half made.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Latch needs Python 3.11 or newer, and '$(PYTHON)' is not. Name one that is: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { \
	  echo "'$(PYTHON)' cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(SERVICE): requirements/cpu.txt pyproject.toml | $(BIN)/pip
	@echo "Installing the service into .venv"
	@$(INSTALL) --require-hashes --requirement requirements/cpu.txt
	@$(INSTALL) --no-deps --editable .
	@touch $@

$(ALL): $(SERVICE) requirements/constraints.txt
	@echo "Installing training, tests and tools into .venv"
	@$(INSTALL) --constraint requirements/constraints.txt --editable '.[cpu,train,dev]'
	@touch $@
