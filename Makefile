# Everything runs in .venv, which `make setup` builds and every target builds if it is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TOOLS := .venv-tools
OLDEST := .venv-oldest
OLDEST_PYTHON ?= python3.12
# Without compiling all modules, which takes a minute: those that are imported are compiled then.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test test-gpu test-oldest test-slow test-matrix test-families test-faults bench gpu-check gpu-check-wheels check format clean \
	fuzz docs lock licences sbom audit

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# For a GPU whose driver is older than torch's own CUDA: the address of an index with builds for another one.
TORCH_INDEX ?=

setup: $(VENV)/ready ## make .venv with everything to run, test and develop (TORCH_INDEX=URL: torch for another CUDA)

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$$(command -v $(PYTHON) || command -v python3) -m venv $(VENV)
	@# torch first and by its exact version: a range may pull a build for other hardware
	@$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/ready ## fine-tune a tiny Llama with LoRA and RaSA, merge, compare
	$(BIN)/python -m rasa_train.demo

test: $(VENV)/ready ## the test suite: on the CPU, GPUs hidden; then, where there is a GPU, test-gpu
	$(BIN)/python -m pytest -n 2 -m 'not slow and not gpu'
	@! command -v nvidia-smi >/dev/null || $(MAKE) test-gpu

test-gpu: $(VENV)/ready ## the tests that need a GPU
	RASA_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

test-oldest: $(OLDEST)/ready ## the test suite with the oldest versions that pyproject.toml allows (gigabytes: torch for CUDA)
	$(OLDEST)/bin/python -m pytest -n 2 -m 'not slow and not gpu'

test-slow: $(VENV)/ready ## what takes minutes, but for what test-matrix, test-families, test-faults and fuzz run
	$(BIN)/python -m pytest -n 2 -m slow --ignore tests/distributed --ignore tests/faults --ignore tests/families \
		--ignore tests/test_fuzz.py

test-matrix: $(VENV)/ready ## every strategy x method against one process (half an hour)
	$(BIN)/python -m pytest -rP -m slow tests/distributed

test-families: $(VENV)/ready ## every model family trained, packed, merged and exported; makes docs/MODELS.md (ten minutes)
	$(BIN)/python -m tests.families.table

test-faults: $(VENV)/ready ## kill, damage, fill the disk: a run survives it (minutes; as root also the disks)
	$(BIN)/python -m pytest tests/faults

bench: $(VENV)/ready ## what adapters cost on this machine, beside PEFT and the paper (docs/BENCHMARKS.md)
	$(BIN)/rasa-bench

gpu-check: $(VENV)/ready ## prove and measure everything on a GPU in nine minutes (docs/GPU.md); TINY=1 tries it on a CPU
	@# STEPS, BUDGET, OUT and TINY reach it through the environment
	$(BIN)/python scripts/gpu_check

gpu-check-wheels: $(VENV)/ready ## download into .whl what gpu-check needs on a machine without a package index
	$(BIN)/python scripts/gpu_check --download-wheels

fuzz: $(VENV)/ready ## 10,000 recipes, files and adapters that nobody meant; hostile files in bounded memory (an hour)
	RASA_FUZZ=10000 $(BIN)/python -m pytest -s tests/test_fuzz.py

check: $(VENV)/ready ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/ready ## write again what is made: the recipe reference, figures of recipes and GPUs, the museum
	$(BIN)/python scripts/make_recipe_reference.py
	$(BIN)/python scripts/measure_recipes.py
	$(BIN)/python scripts/make_benchmark_tables.py
	$(BIN)/python scripts/make_museum.py

format: $(VENV)/ready ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(TOOLS)/ready: Makefile
	@$$(command -v $(PYTHON) || command -v python3) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet uv==0.13.9 pip-audit==2.10.1 cyclonedx-bom==7.5.0
	@touch $@

# What is named in pyproject.toml at its lower bound, what that needs in turn at its newest. The command of the wanted
# Python is run, not only looked for: a shim may be there without a Python behind it. pytablewriter (of lm-eval) has
# old versions without upper bounds, to which uv would go back for the sake of newer packages elsewhere.
$(OLDEST)/ready: pyproject.toml | $(TOOLS)/ready
	@echo "setting up $(OLDEST) (ten minutes the first time)"
	@$(TOOLS)/bin/uv venv --quiet --clear --no-python-downloads --python \
		$$($(OLDEST_PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON)) $(OLDEST)
	@DS_BUILD_OPS=0 $(TOOLS)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct \
		--editable '.[dev]' 'pytablewriter>=1.2'
	@touch $@

lock: $(TOOLS)/ready ## pin every dependency of every extra with its hashes: requirements.lock
	$(TOOLS)/bin/uv pip compile pyproject.toml -c constraints.txt --all-extras --universal --python-version 3.11 \
		--generate-hashes --no-annotate --custom-compile-command "make lock" --quiet --output-file requirements.lock

licences: $(VENV)/ready ## licences of what is installed, against those that are allowed
	$(BIN)/python scripts/check_licences.py

sbom: $(TOOLS)/ready $(VENV)/ready ## what is installed, as CycloneDX: sbom.json
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-format JSON --output-file sbom.json $(BIN)/python

audit: $(TOOLS)/ready ## known vulnerabilities of what requirements.lock pins (asks a service of the index)
	$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock

clean: ## remove the environment and all caches
	rm -rf $(VENV) $(TOOLS) $(OLDEST) .pytest_cache .ruff_cache .mypy_cache build dist
