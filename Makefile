.PHONY: install test lint quickstart ci

install:  ## the package with what the tests and the quick start need
	pip install -e ".[test]"

test:
	pytest

lint:
	ruff check . && ruff format --check . && mypy

quickstart:
	python examples/quickstart.py

ci:  ## everything above but the quick start, from a fresh virtual environment
	.ci/run
