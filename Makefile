# make demo   environment, install, a training in the toy world: pictures in about five minutes on a laptop's CPU
# make test   the test suite, without the tests marked slow
# make check  ruff, basedpyright
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow check docs clean

demo: .venv/.installed
	$(BIN)/draftp train --preset toy

test: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 -m "not slow"

slow: .venv/.installed-test
	$(BIN)/python -m pytest -m slow

check: .venv/.installed-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

docs: .venv/.installed
	$(BIN)/python docs/make_cli.py

.venv/.installed: pyproject.toml constraints.txt
	@echo "installing into .venv, a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

.venv/.installed-lint: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lint]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
