# Two commands: `make demo` and `make test`. Both set everything up in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak bench lint clean

demo: .venv/installed
	$(BIN)/moonmind-ext demo --output demo-output

# On several cores; more than four would wait for the same disk.
test: .venv/installed
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4

# Long and rough: JOBS, SEED (the last one's is in its output) and ENGINE (embedded, dagger).
soak: .venv/installed
	$(BIN)/python -m tests.worker.soak --jobs $(or $(JOBS),500) --engine $(or $(ENGINE),embedded) $(if $(SEED),--seed $(SEED))

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# What takes how long, on whatever engine there is: docs/performance.md.
bench: .venv/installed
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf .venv demo-output

# Versions and hashes as in constraints.txt, the build backend included, so that an
# install gives the same tomorrow.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
