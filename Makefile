# Every verb makes what it needs in .venv first; a second call is quick. CI calls the same verbs.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest
WORKERS ?= 2
# The tests of the source text. `make check` runs them, so `make test` does not.
CHECKED := $(addprefix tests/surface/test_,house_rules.py contract.py homonyms.py limits.py)

# A worker that has no test left takes some of the other one (`worksteal`).

# Rewriting the asserts of all test files takes 20 s in each worker of a fresh clone. Quick tests show local variables
# instead, and `make test-all` and `pytest FILE` show the parts of an assert.
PLAIN := --assert=plain --showlocals

# Tests start some hundred processes. Without compiled files each of them would compile the package anew, for a second.
unexport PYTHONDONTWRITEBYTECODE

# Sets that come as files (mnist, heart): looked for beside the project where nothing else is said.
ifneq ($(wildcard ../shared/data),)
export ATOLL_DATA ?= $(abspath ../shared/data)
endif

.PHONY: help setup demo test test-all sanitize check check-types check-style docs bench release setup-faces faces
.DEFAULT_GOAL := help

help:
	@echo "make VERB, where VERB is one of"
	@sed -n 's/^\([a-z-]*\):.*## /  \1	/p' Makefile | expand -t 12
	@$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(NO_PYTHON)

setup: .venv/.core ## make .venv and install atoll into it

demo: .venv/.core ## train on the digits, 100 clients, beside pooled and local-only training
	.venv/bin/atoll run --baselines --out runs

test: .venv/.dev ## install what tests need, run the quick tests and the examples in docstrings
	$(PYTEST) -n $(WORKERS) --dist worksteal $(PLAIN) -m "not slow" --doctest-modules tests src/atoll $(addprefix --ignore=,$(CHECKED) tests/surface/test_typing.py)

test-all: .venv/.dev ## the same with the slow tests
	$(PYTEST) -n $(WORKERS) --doctest-modules tests src/atoll

sanitize: .venv/.dev ## run the tests of native code under the address and undefined-behaviour sanitizers
	tests/sanitize.sh $(PY)

check: .venv/.dev ## style, types, layers, contract of parts, prose, house rules
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target check-types check-style

# The typed programs of users come after `mypy`, whose cache they use. It takes half the time, so the rest runs beside it.
check-types:
	$(PY) -m mypy
	$(PYTEST) -q tests/surface/test_typing.py

check-style:
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports
	$(PY) tests/surface/prose.py --check
	$(PYTEST) -q $(CHECKED)

docs: .venv/.docs ## build the pages into docs/_build, and dist/atoll-docs.zip with them
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build
	$(PY) -c 'import shutil; shutil.make_archive("dist/atoll-docs", "zip", "docs/_build")'

# `benchmarks/short.txt` has a program and its arguments in each line, which take at most two minutes. Some programs take hours
# with their own settings: `python benchmarks/NAME.py --help` describes them.
bench: .venv/.dev ## run the programs in benchmarks/ with short settings, some minutes in all
	@mkdir -p build; failed=0; while read -r line; do echo "== $$line"; \
	$(PY) benchmarks/$$line </dev/null || failed=1; done <benchmarks/short.txt; exit $$failed

setup-faces: .venv/.faces ## install the extras of the page, notebooks, trackers and Hugging Face, and playwright

faces: .venv/.faces ## test them, with Chromium; write twelve pictures of the page to build/faces
	$(PYTEST) -q tests/surface/test_browser.py tests/surface/test_notebook.py tests/surface/test_track.py tests/surface/test_sweep.py \
		tests/surface/test_new.py tests/data/test_hub.py
	$(PIP) -q --no-deps --upgrade --target build/ipykernel6 'ipykernel<7'
	PYTHONPATH=build/ipykernel6 $(PYTEST) -q tests/surface/test_notebook.py -k kernel
	$(PY) tests/faces.py build/faces

release: .venv/.release ## build sdist and wheel into dist/, check them, and use the wheel in a new environment
	$(PY) tests/release.py

# pip, not python, is the proof of a whole .venv: a Debian without python3-venv leaves one half made.
.venv/bin/pip:
	@$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { $(NO_PYTHON); exit 1; }
	$(PYTHON) -m venv --clear .venv

.venv/.core: pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP) -e '.[net]'
	@touch $@

.venv/.dev: .venv/.core
	$(PIP) -q -e '.[dev]'
	@touch $@

.venv/.docs: .venv/.core
	$(PIP) -q -e '.[docs]'
	@touch $@

.venv/.faces: .venv/.dev
	$(PIP) -q -e '.[sweep,mlflow,tensorboard,wandb,hf,faces]'
	@touch $@

.venv/.release: .venv/.core
	$(PIP) -q -e '.[release]'
	@touch $@

define NO_PYTHON
{ echo; echo "$(PYTHON) is missing, older than 3.11, or cannot make a .venv."; \
  echo "Write:  apt-get install python3 python3-venv     (as root; Debian 12 has Python 3.11)"; \
  echo "   or:  make PYTHON=/path/to/python3.11"; } >&2
endef
