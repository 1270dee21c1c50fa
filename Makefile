# make dev | demo | docs | tutorials | test | test-slow | test-tpu-compiler | test-lmms-eval | test-transformers4 | lint | bench | clean
# Each target creates the environment that it needs in $(VENV), that of lmms-eval in $(LMMS_VENV), and the folder with
# transformers 4 in $(TRANSFORMERS4). VERSIONS=lowest or newest, and BASE_PYTHON=python3.13, change what a new environment
# has (tools/setup_env.sh); give it a folder of its own: make test VENV=.venv-lowest VERSIONS=lowest.
VENV ?= .venv
LMMS_VENV ?= .venv-lmms-eval
TRANSFORMERS4 ?= .transformers4
PYTHON := $(VENV)/bin/python
DEMO_STEPS ?=
DEMO_ARGS ?=
DEMO_DIR ?= runs/demo
PYTEST_ARGS ?=
TUTORIALS_ARGS ?=
# The tests of one file run in one process, so that what they share is made once.
PYTEST_PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
export JAX_PLATFORMS ?= cpu
# Hundreds of processes import the same packages. Where this variable is set, each of them compiles their source anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: dev demo docs tutorials test test-slow test-tpu-compiler test-lmms-eval test-transformers4 lint bench clean

dev: $(VENV)/.dev
	@echo "$(VENV) is ready: . $(VENV)/bin/activate"

demo: $(VENV)/.core
	$(PYTHON) -m vr_jax demo --workdir=$(DEMO_DIR) $(if $(DEMO_STEPS),--steps=$(DEMO_STEPS)) $(DEMO_ARGS)
	@$(if $(DEMO_STEPS),echo "Only $(DEMO_STEPS) updates were made; 'make demo' without DEMO_STEPS makes all of them.",echo "Nothing was skipped.")

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict
	@echo "Built the folder site; to read it: $(PYTHON) -m http.server --directory site"

tutorials: $(VENV)/.dev
	$(PYTHON) -m tools.tutorials $(TUTORIALS_ARGS) docs/tutorials

test: $(VENV)/.dev
	$(PYTHON) -m pytest $(PYTEST_PARALLEL) -q -m "not slow" $(PYTEST_ARGS)
	@echo "Not run: slow tests (make test-slow) and tests inside lmms-eval (make test-lmms-eval)."
	@echo "The summary above gives the reason of every skipped test."

test-slow: $(VENV)/.dev
	$(PYTHON) -m pytest $(PYTEST_PARALLEL) -q -m slow $(PYTEST_ARGS)

# The kernel and a whole plan, compiled for TPUs on a machine that has none.
test-tpu-compiler: $(VENV)/.dev
	$(PYTHON) -c "import libtpu"
	$(PYTHON) -m pytest -q -m "slow or not slow" tests/kernels/window_attention/test_pallas_tpu.py \
	  tests/plan/test_plan.py::test_a_plan_for_tpu $(PYTEST_ARGS)

test-lmms-eval: $(VENV)/.dev $(LMMS_VENV)/.ready
	VR_JAX_LMMS_EVAL_PYTHON=$(abspath $(LMMS_VENV)/bin/python) $(PYTHON) -m pytest -q tests/evaluation/test_lmms_eval_host.py

test-transformers4: $(VENV)/.dev $(TRANSFORMERS4)/.ready
	VR_JAX_TRANSFORMERS4=$(abspath $(TRANSFORMERS4)) $(PYTHON) -m pytest -q -m "slow or not slow" tests/convert/test_transformers4.py

lint: $(VENV)/.dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports --no-cache
	$(PYTHON) tools/check_words.py
	$(PYTHON) tools/check_schemas.py

bench: $(VENV)/.dev
	$(PYTHON) -m benchmarks.speed.cpu
	$(PYTHON) -m benchmarks.evaluation.lmms_eval
	$(PYTHON) -m benchmarks.input.pipeline
	$(PYTHON) -m benchmarks.speed.step_cost

clean:
	rm -rf $(VENV) $(LMMS_VENV) $(TRANSFORMERS4) runs site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.core: pyproject.toml constraints.txt tools/setup_env.sh
	sh tools/setup_env.sh $(VENV)
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt tools/setup_env.sh
	sh tools/setup_env.sh $(VENV) test,lint,tpu
	touch $(VENV)/.core $@

$(VENV)/.docs: pyproject.toml constraints.txt tools/setup_env.sh | $(VENV)/.dev
	sh tools/setup_env.sh $(VENV) docs
	touch $@

$(LMMS_VENV)/.ready: pyproject.toml constraints.txt tools/setup_env.sh tools/setup_lmms_eval.sh | $(VENV)/.dev
	sh tools/setup_lmms_eval.sh $(LMMS_VENV)
	touch $@

$(TRANSFORMERS4)/.ready: tools/setup_transformers4.sh | $(VENV)/.dev
	sh tools/setup_transformers4.sh $(PYTHON) $(TRANSFORMERS4)
	touch $@
