# Everything runs in .venv, made on first use. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo bench test lint types wheel clean

demo: .venv/installed
	$(BIN)/python -m bench demo

bench: .venv/installed
	$(BIN)/python -m bench step --quick --plot bench.png

test: .venv/installed
	$(BIN)/python -m pytest -n 2
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python -m pytest -m gpu; else echo "No GPU here: tests marked gpu were skipped."; fi

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

# The wheel and the sdist, installed beside Hugging Face's `kernels`, used from another folder, and removed again.
wheel: .venv/installed
	$(BIN)/python tests/wheel_check.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo.png bench.png
