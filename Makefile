# make demo   install what is needed into .venv and run the demonstration
# make test   install, then run the tests
# make lint   ruff, format and rules
# make bench  the benchmarks of bench/ (pytest-benchmark)
# make train-demo   train the bundled checkpoints again, into demo-checkpoints/

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench train-demo clean

demo: .venv/.installed
	$(BIN)/cna demo --out demo-out

test: .venv/.installed-test
	$(BIN)/python -m pytest

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/.installed-test
	$(BIN)/python -m pytest bench -s --benchmark-enable --benchmark-columns=min,median,iqr,rounds

train-demo: .venv/.installed
	$(BIN)/python -m cna_kernels.model.demo.train --out demo-checkpoints

clean:
	rm -rf .venv build *.egg-info demo-out demo-checkpoints

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@
