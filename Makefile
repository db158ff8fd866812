# Every target sets itself up: `make demo` and `make test` work on a fresh machine with Python 3.11+, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= cpu,postgres,test
PIP_FLAGS ?= --quiet --disable-pip-version-check
N ?= 100
SEED ?= 0
FAST := not slow and not browser and not postgres and not gpu

.PHONY: install demo demo-check test coverage fast slow-list check crash bench results clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("polyclip needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null || $(MAKE) --no-print-directory venv-without-ensurepip
	@echo "installing into $(VENV): about 6 GB, a few minutes the first time"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

# Debian's python3 comes without ensurepip unless python3-venv is installed; virtualenv brings its own pip.
venv-without-ensurepip:
	@rm -rf $(VENV)
	@$(PYTHON) -m pip install $(PIP_FLAGS) --target $(VENV)-bootstrap virtualenv
	@PYTHONPATH=$(VENV)-bootstrap $(PYTHON) -m virtualenv --quiet $(VENV)
	@rm -rf $(VENV)-bootstrap

demo: install
	@$(BIN)/polyclip demo

demo-check: install
	@$(BIN)/polyclip demo --check

test: install
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

coverage: install
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --cov --cov-report=term:skip-covered

# What a change is tried with every few minutes: no server, browser, database server, GPU or crash.
fast: install
	@$(BIN)/python -m pytest --quiet --no-header --numprocesses 2 --dist loadfile -m "$(FAST)"

# Which tests `make fast` leaves out, measured anew.
slow-list: install
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations=0 --durations-min=0.05 | tee /dev/stderr | $(BIN)/python tests/slow.py

check: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest --quiet --no-header tests/test_layering.py tests/test_docs.py

crash: install
	@$(BIN)/python tests/crash --rounds $(N) --seed $(SEED)

bench: install
	@$(BIN)/python -m bench

results: install
	@$(BIN)/python -m bench.claims

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage build *.egg-info
