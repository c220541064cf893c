# make setup | demo | test | test-all | test-newest | check | bench | results | lock
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed

define NEEDS_PYTHON
command -v $(PYTHON) >/dev/null || { echo "set-up: $(PYTHON) not found; pass PYTHON=... (3.11 or newer)" >&2; exit 2; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "set-up: $(PYTHON) is $$($(PYTHON) --version 2>&1), \
and 3.11 or newer is needed; pass PYTHON=..." >&2; exit 2; }
endef

.PHONY: setup demo test test-all test-newest check bench results lock

setup: $(STAMP)

# Reinstalled only when what it was installed from changes.
$(STAMP): pyproject.toml requirements.lock
	@$(NEEDS_PYTHON)
	@$(PYTHON) -m tools.install .venv
	@touch $(STAMP)

demo: setup
	$(PY) -m studies.demo

# The quick tier; test-all is the rest: each test is in one of them.
test: setup
	@echo "test: the quick tests; make test-all runs the rest"
	$(PY) -m pytest -n 2 -m "not slow"

test-all: setup
	@echo "test-all: the tests marked slow; make test runs all others"
	$(PY) -m pytest -n 2 -m slow

# Outside CI: the newest versions that pyproject.toml allows, in an environment of their own. TORCH=VERSION to change torch too.
test-newest:
	@$(NEEDS_PYTHON)
	@$(PYTHON) -m tools.install .venv-newest --newest $(if $(TORCH),--torch $(TORCH))
	.venv-newest/bin/python -m pytest -n 2

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
	$(PY) -m benchmarks.matrix_methods

results: setup
	$(PY) -m studies.cells

# Rewrites requirements.lock with the newest versions. TORCH=VERSION to change torch too.
lock:
	@$(NEEDS_PYTHON)
	@$(PYTHON) -m tools.lock $(if $(TORCH),--torch $(TORCH))
