# make setup | demo | test | check | bench | results
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed

.PHONY: setup demo test check bench results

setup: $(STAMP)

# Reinstalled only when what it was installed from changes.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) not found; pass PYTHON=python3 (3.11 or newer)"; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup
	$(PY) -m studies.demo

test: setup
	$(PY) -m pytest -n 2

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright

bench: setup
	$(PY) -m benchmarks.merge
	$(PY) -m benchmarks.coefficient_step
	$(PY) -m benchmarks.glue_step
	$(PY) -m benchmarks.routed_forward
	$(PY) -m benchmarks.doctor

results: setup
	$(PY) -m studies.cells
