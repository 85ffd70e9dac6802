# Two commands for people: `make demo` and `make test`. Both make their own virtual environment and need only
# Python >= 3.11, make and (for the native kernels) a C++ compiler.
PYTHON ?= python3
VENV   ?= .venv
# Test files are shared out to this many processes; 0: all in one, e.g. for a debugger.
WORKERS ?= 2
# A libmimo_kernels.so built from these sources that the tests are to use, instead of building it again.
LIBRARY ?=
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test check wheel clean
.DELETE_ON_ERROR:

# torch goes first: with it in place nothing else pulls another build of it.
$(VENV)/.base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	touch $@

$(VENV)/.user: $(VENV)/.base pyproject.toml $(shell find mimo_local quant tui -type f -not -name '*.pyc' -not -name '*.so')
	$(PIP) install -c constraints.txt .
	touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml $(shell find mimo_local/kernels -type f -not -name '*.pyc' -not -name '*.so')
	$(PIP) install -c constraints.txt $(if $(LIBRARY),-C cmake.define.MIMO_LIBRARY=$(LIBRARY)) -e '.[dev]'
	touch $@

demo: $(VENV)/.user ## build the demo pack, answer a prompt, summarise a PDF
	cd examples && ../$(BIN)/mimo demo
	cd examples && ../$(BIN)/mimo chat --seed 1 --stats "Name three things a lighthouse keeper does."
	cd examples && ../$(BIN)/mimo summarize tour.pdf --seed 1

test: $(VENV)/.dev ## the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev ## lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

wheel: $(VENV)/.dev ## the wheel built, installed elsewhere, used
	rm -rf build/wheel
	$(BIN)/python .ci/wheel.py build build/wheel
	$(BIN)/python .ci/wheel.py use build/wheel

clean:
	rm -rf $(VENV) build dist
