# make serve   set up and serve the built-in model; make serve ARGS="model.gguf --port 8000" for more
# make test    set up the pinned test environment and run the tests; make test ARGS="tests/plan -x"
# make lint    ruff, and mypy for Linux, macOS and Windows
# make bench   speed on this machine: models of real shapes, built-in model, ring, kernels, links, sampler, turns; then what
#              rounding costs; make bench ARGS="--all --llama-bench PATH" for larger models and beside llama.cpp
#
# PYTHON and VENV choose the interpreter (3.11 or newer) and the folder of the virtual environment. The install is an
# editable one: changes of Python files count at once, changes of native code or pyproject.toml at the next make.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml CMakeLists.txt prima_core/model/codebooks.py $(wildcard backends/prima_numpy/native/* prima_core/native/*)

.PHONY: serve test lint bench
serve: $(VENV)/.installed
	$(BIN)/prima serve $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --platform linux
	$(BIN)/mypy --platform darwin
	$(BIN)/mypy --platform win32

bench: $(VENV)/.installed-bench
	$(BIN)/python -m bench.cpu $(ARGS)
	$(BIN)/prima bench
	$(BIN)/python bench/ring.py
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/links.py
	$(BIN)/python bench/sampler.py
	$(BIN)/python bench/turns.py
	$(BIN)/python -m bench.accuracy

$(VENV)/.installed: $(BUILD_INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-bench: $(BUILD_INPUTS) constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[testing]"
	touch $(VENV)/.installed $@

$(VENV)/.installed-dev: $(BUILD_INPUTS) constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(VENV)/.installed $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"prima needs Python 3.11 or newer, this is {v}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
