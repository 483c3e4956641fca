# Everything that a fresh machine needs: python3 (3.11-3.13). A C++ compiler makes it faster and is optional.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test lint clean

demo: .venv/ready
	$(PY) scripts/demo.py

test: .venv/ready lint
	$(PY) -m pytest

lint: .venv/ready
	$(PY) -m ruff check src tests scripts
	$(PY) -m mypy

# Made again when the list of packages or the compiled sources change.
.venv/ready: pyproject.toml setup.py constraints.txt $(wildcard src/linic/kernels/*.cpp src/linic/kernels/*.inc src/linic/kernels/*/*.cpp src/linic/kernels/*/*.inc)
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build demo-out
