# Side-by-side runs; each rival lives in an environment of its own. Included by the Makefile.
.PHONY: benchmarks

## benchmarks: Bluejay and its rivals, alternating, on GPT-J-6B's shapes; writes docs/benchmarks (half an hour, 16 GiB)
benchmarks: kernels .venvs/rivals-ctranslate2/.installed .venvs/rivals-openvino/.installed $(ORACLE)/.installed
	$(BIN)/python -m benchmarks.compare

.venvs/rivals-%/.installed: benchmarks/requirements/%.txt | $(BIN)/python
	@echo "Installing $* for the side-by-side runs into $(@D) …"
	@tools/make-venv $(PYTHON) $(@D)
	@$(@D)/bin/python $(PIP) --requirement $<
	@touch $@
