# Real clients of the hosted services, unmodified; each lives in an environment of its own. Included by the Makefile.
CLIENTS := $(patsubst tests/e2e/requirements/%.txt,.venvs/clients-%/.installed,$(wildcard tests/e2e/requirements/*.txt))

.PHONY: clients test-clients

## clients: the environments of the real clients, which tests/e2e drives against a server
clients: $(CLIENTS)

## test-clients: the tests with real clients alone; `make test` does them as well
test-clients: kernels clients
	BLUEJAY_REQUIRE_CLIENTS=1 $(BIN)/python -m pytest tests/e2e

CLIENT_PYTHON = $(PYTHON)
# Its dependencies have no wheels for a newer one.
.venvs/clients-baseten-classic/.installed: CLIENT_PYTHON = $(shell \
  $(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 12))' && echo $(PYTHON) || command -v python3.11)

.venvs/clients-%/.installed: tests/e2e/requirements/%.txt | $(BIN)/python
	@echo "Installing the client $* into $(@D) …"
	@tools/make-venv $(CLIENT_PYTHON) $(@D)
	@$(@D)/bin/python $(PIP) --no-compile --requirement $<
	@touch $@
