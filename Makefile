# Everything that Bluejay needs is installed into .venv and .venvs by the targets themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ORACLE := .venvs/oracle
# pip checks for its own updates and keeps notices on stderr: neither belongs into a first run.
PIP := -m pip --disable-pip-version-check install --quiet

.PHONY: demo kernels test test-sanitizers test-slow check default-model format clean
.DEFAULT_GOAL := demo

## demo: install, serve the default model, ask it a question, go on serving until Ctrl-C; FLAGS="--port 8001" for another port
demo: $(VENV)/.installed
	@tools/demo $(BIN) $(FLAGS)

## kernels: compile csrc/ again, as far as it changed; without a compiler the reference goes on serving
kernels: $(VENV)/.tested
	@tools/build-kernels $(BIN)/python

## test: everything that decides, in under 20 minutes on two cores
test: check kernels $(ORACLE)/.installed clients
	BLUEJAY_REQUIRE_ORACLE=1 BLUEJAY_REQUIRE_CLIENTS=1 $(BIN)/python -m pytest -m "not slow"

## test-slow: long and large tests
test-slow: kernels $(ORACLE)/.installed clients
	BLUEJAY_REQUIRE_ORACLE=1 BLUEJAY_REQUIRE_CLIENTS=1 $(BIN)/python -m pytest -m slow

## test-sanitizers: the kernels' tests, with AddressSanitizer and UndefinedBehaviorSanitizer; `make test` does it as well
test-sanitizers: kernels
	$(BIN)/python -m pytest tests/ops/test_sanitizers.py

## check: style, types, import order
check: $(VENV)/.tested
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/mypy -p benchmarks
	$(BIN)/lint-imports

## default-model: train the default model and its draft again; needs ../shared/data/stories and some hours
default-model: $(VENV)/.tested
	$(BIN)/bluejay train recipes/default.toml --fresh
	$(BIN)/bluejay convert runs/default/model src/bluejay/default_model --dtype float16 --force
	$(BIN)/bluejay train recipes/default-draft.toml --fresh
	$(BIN)/bluejay convert runs/default-draft/model src/bluejay/default_model/draft --dtype float16 --force
	cp runs/default/loss.png src/bluejay/default_model/loss.png
	for folder in src/bluejay/default_model src/bluejay/default_model/draft; do \
	  cp recipes/generation_config.json $$folder/ && \
	  (cd $$folder && sha256sum *.json *.safetensors merges.txt > SHA256SUMS) || exit 1; done

format: $(VENV)/.tested
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

$(BIN)/python:
	@tools/make-venv $(PYTHON) $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Bluejay and PyTorch into $(VENV); this takes some minutes, once …"
	@$(BIN)/python $(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.tested: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Bluejay with its test tools into $(VENV) …"
	@$(BIN)/python $(PIP) --constraint constraints.txt --config-settings wheel.cmake=false --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(ORACLE)/.installed: tests/parity/requirements.txt | $(BIN)/python
	@echo "Installing transformers, which the parity tests compare with, into $(ORACLE) …"
	@tools/make-venv $(PYTHON) $(ORACLE)
	@$(ORACLE)/bin/python $(PIP) --requirement tests/parity/requirements.txt
	@touch $@

include tests/e2e/clients.mk
include benchmarks/rivals.mk

clean:
	rm -rf $(VENV) .venvs build dist src/bluejay/ops/_native*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
