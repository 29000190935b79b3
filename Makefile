# make demo | test | bench | docs | clean         ARGS are passed on: make demo ARGS="--problem cnn --seeds 5"

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
BENCHMARKS := replaces_tuned_warmup defaults_are_measured tracks_sharpness edge_of_stability costs_what_it_says \
  published_recipes what_is_said_of_warmup

export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONDONTWRITEBYTECODE  # the suite starts many processes, and each would compile torch again

.PHONY: demo test bench docs clean

demo: $(VENV)/.bench
	$(RUN) -m benchmarks.demo $(ARGS)

test: export OMP_NUM_THREADS := 1
test: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy --strict warmctl
	$(VENV)/bin/lint-imports
	$(RUN) -m pytest -n 2 --dist loadgroup $(ARGS)

bench: $(VENV)/.bench
	@set -e; for name in $(BENCHMARKS); do (set -x; $(RUN) -m benchmarks.$$name --quick $(ARGS)); done

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.docs
	$(RUN) -m mkdocs build --strict

clean:
	rm -rf dist site demo-out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# .venv/.EXTRA: the environment with that extra in it.
$(VENV)/.%: pyproject.toml constraints.txt | $(RUN)
	$(RUN) -m pip install --quiet --no-compile -c constraints.txt -e ".[$*]"
	touch $@

$(RUN):
	$(PYTHON) -m venv $(VENV)
