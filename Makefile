.PHONY: install test lint quickstart ci

install:  ## the package with what the tests and the quick start need
	pip install -e ".[test]"

test:
	pytest

lint:
	ruff check .

quickstart:
	python examples/quickstart.py

ci:  ## everything above but the quick start, from a fresh virtual environment
	.ci/run
