.PHONY: install test lint quickstart ci

install:  ## the package with what the tests and the quick start need
	pip install -e ".[test]"

test:
	pytest

lint:
	ruff check . && ruff format --check . && mypy && bandit --quiet --recursive -ll lasar_hf lasar_cli.py recipes examples

quickstart:
	python examples/quickstart.py

ci:  ## everything above but the quick start, from a fresh virtual environment
	.ci/run
