# Every target works from a fresh clone: the virtual environment is made and updated on demand.
# `make TARGET VENV=` uses $(PYTHON) as it is instead (a container that has its own torch).
PYTHON ?= python3
RECIPE ?= recipes/demo/w3g64.yaml
VENV    = .venv

export OMP_WAIT_POLICY = PASSIVE

ifeq ($(VENV),)
PY    = $(PYTHON)
CORE  =
DEV   =
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels
else
PY    = $(VENV)/bin/python
CORE  = $(VENV)/.installed
DEV   = $(VENV)/.installed-dev
endif
INSTALL = $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu bench lint fmt loc wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(CORE) ## quantize SmolLM2-135M on this machine, from nothing; the last line is the result as JSON (RECIPE=...)
	@$(PY) recipes/demo/fetch.py >&2
	@$(PY) -m qatcli run $(RECIPE) --json

test: $(DEV) ## every test that needs no GPU
	@$(PY) -m pytest -m "not gpu" -n auto --maxprocesses 8

test-gpu: $(DEV) ## the tests that need a GPU
	@$(PY) -m pytest -m gpu

bench: $(DEV) ## measure the kernels on this machine
	@$(PY) benchmarks/kernels.py

lint: $(DEV) ## ruff, formatting, types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

fmt: $(DEV) ## format, and fix what ruff can fix
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

loc: ## count the lines of each part
	@for part in qatcli kernels tests; do \
	    printf '%6d  %s\n' "$$(find $$part -name '*.py' -exec cat {} + | wc -l)" "$$part"; \
	done

wheel: $(DEV) ## build the wheel into dist/ and list what it holds
	@rm -rf build dist
	@$(PY) -m pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	@$(PY) -m zipfile -l dist/*.whl

clean: ## remove builds and caches (not $(VENV), .demo or runs)
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find qatcli kernels recipes tests -name __pycache__ -type d -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a minute or two, once)" >&2
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e '.[gguf]' >&2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools into $(VENV)" >&2
	@$(INSTALL) -e '.[dev,eval,gguf,gptq,runtimes]' >&2
	@touch $@
