# Two commands that set up all they need: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build is small; where a GPU is at hand, install torch for it first, or pass TORCH="torch".
TORCH ?= torch==2.13.0

.PHONY: demo test oldest matrix lint clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed  ## pre-train a small Llama with Adam-mini and with AdamW, and compare
	$(BIN)/python examples/pretrain.py

test: $(VENV)/.installed  ## lint, type check and all tests but the slow ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

oldest: $(VENV)/.installed  ## the oldest versions allowed, and torch alone, in environments of their own
	$(BIN)/python tests/matrix/run.py torch "no kernel" oldest

matrix: $(VENV)/.installed  ## the same, and the newest versions from the index
	$(BIN)/python tests/matrix/run.py

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# torch first: what depends on it would otherwise bring the build with CUDA.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
