# make demo | test | lint | bench | clean. Each creates the environment it needs in $(VENV).
VENV ?= .venv
PYTHON := $(VENV)/bin/python
DEMO_STEPS ?=
DEMO_DIR ?= runs/demo
PYTEST_ARGS ?=
export JAX_PLATFORMS ?= cpu

.PHONY: demo test lint bench clean

demo: $(VENV)/.core
	$(PYTHON) -m vr_jax.demo --workdir=$(DEMO_DIR) $(if $(DEMO_STEPS),--steps=$(DEMO_STEPS))

test: $(VENV)/.dev
	$(PYTHON) -m pytest -n 2 -q -m "not slow" $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: $(VENV)/.dev
	$(PYTHON) benchmarks/cpu.py

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.core: pyproject.toml constraints.txt tools/setup_env.sh
	sh tools/setup_env.sh $(VENV)
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt tools/setup_env.sh
	sh tools/setup_env.sh $(VENV) test,lint
	touch $(VENV)/.core $@
