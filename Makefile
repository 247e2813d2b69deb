# `make demo` and `make test` need nothing but Python 3.11 or newer: they make .venv and fill it with pinned versions.
PY := .venv/bin/python
READY := .venv/.ready
# Bytecode is kept, whatever the environment says: what is imported is compiled once, not at every start.
export PYTHONDONTWRITEBYTECODE :=
# Two processes of one thread each: threads of small networks wait for each other most of the time.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

help:  ## list the targets
	@sed -n 's/^\([a-z]*\): .*## \(.*\)/make \1\t\2/p' Makefile

demo: $(READY)  ## make data, train shortly, fill gaps, draw the picture, print the scores
	$(PY) train.py experiment=demo
	$(PY) infer.py ckpt=outputs/train/demo mask=block colour=vorticity name=demo
	$(PY) evaluate.py ckpt=outputs/train/demo 'masks=[pixels,block,track]' sampler.steps=24 name=demo

test: lint  ## lint and run the tests
	$(PYTEST) -q

quick: $(READY)  ## the tests that take little time, in a few minutes
	$(PYTEST) -q -m 'not slow'

lint: $(READY)  ## check style, formatting and the types of the public face
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)  ## format the code and mend what ruff can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(READY)  ## build the site into docs/_build
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(PY) -m sphinx --fail-on-warning --quiet docs docs/_build
	@echo open docs/_build/index.html

clean:  ## remove the environment and all caches; data and runs stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis docs/_build
	find . -name __pycache__ -prune -exec rm -rf {} +

# Not compiled: Python does that for what is imported, in a tenth of the time.
$(READY): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

$(PY):
	@for python in python3.11 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then exec $$python -m venv .venv; fi; \
	done; echo "error: Python 3.11 or newer is needed (python3.11 or python3)" >&2; exit 1

# Hooks for git: what `make lint` runs, before each commit.
hooks: $(READY)  ## run `make lint` before each commit
	$(PY) -m pre_commit install

.PHONY: help demo test quick hooks lint format docs clean
