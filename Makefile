# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test install audit clean

demo: $(VENV)/installed
	$(BIN)/agcl compare jobs/configs/facts.yaml --methods sequential,agcl

test: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 3 --dist loadgroup --no-loadscope-reorder

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "agcl needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@echo "installing into $(VENV) (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile torch
# pip unpacks on one core, and resolves slowly: the pinned versions come in two halves side by side, and the
# next line adds what they may lack.
	@for half in 0 1; do \
		grep -v '^#' constraints.txt | awk "NR % 2 == $$half" | xargs $(PIP) --no-compile --no-deps & \
	done; wait
	$(PIP) --no-compile --editable '.[dev]'
# pip would compile on one core, and much that nobody imports. Templates that some packages hold fail.
	@$(BIN)/python -m compileall -q -j 0 -x '/(tests|rllib)/|transformers/models/' $(VENV)/lib \
		> /dev/null 2>&1 || true
	touch $@

# Known vulnerabilities of the pinned versions; asks PyPI, and is not part of the tests.
audit: $(VENV)/installed
	$(PIP) pip-audit
	$(BIN)/python -m pip_audit --requirement constraints.txt --no-deps --disable-pip --strict

clean:
	rm -rf $(VENV) storage
