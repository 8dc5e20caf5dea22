# `make demo` trains two models with torch's loss and with this one; `make test` runs all tests.
# Both make their own environment in .venv. On a machine whose package index has no CPU build of torch under this
# name, say which one to install: make demo TORCH="torch==2.13.0"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 8 --dist loadgroup
SANITIZED := autograd cross_entropy distillation errors large_gradients options row_stats special_values
OPERATORS := $(SANITIZED) torch_samples deferred_errors operators parallel compatibility
SOURCES := setup.py pyproject.toml build_backend.py $(shell find csrc -type f)

.PHONY: demo test check sanitize emulate gpu-check bench readme-figures compatibility resources clean

demo: $(VENV)/built
	$(RUN) -m examples

test: $(VENV)/built
	$(PYTEST)

# Style and types; the tools are pinned, so that their taste does not change under the code.
check: $(VENV)/built
	$(RUN) -m pip install -q ruff==0.14.5 mypy==1.18.2 clang-format==21.1.5
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	find csrc tests/emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror

# The operator tests with the C++ under AddressSanitizer and UBSan, which have to be loaded before Python itself and
# report to a standard error that pytest must not swallow. Each way to read runs on one instruction set, and the kernels
# for AVX-512 are left out: AVX2's take their place.
RUNTIMES = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libubsan.so)
sanitize: $(VENV)/built
	CROSS_ENTROPY_SANITIZE=address,undefined $(RUN) setup.py -q build --build-lib build/sanitized \
		--build-temp build/sanitized-objects
	CROSS_ENTROPY_STRIPES=0 LD_PRELOAD=$(RUNTIMES) ASAN_OPTIONS=detect_leaks=0 PYTHONSAFEPATH=1 \
		PYTHONPATH=build/sanitized:. $(PYTEST) --capture=sys -k "not no_operator and not avx" \
		$(addprefix tests/test_,$(addsuffix .py,$(SANITIZED)))

# The operator tests on the CUDA kernels, compiled for the CPU.
emulate: $(VENV)/built
	CROSS_ENTROPY_EMULATE=1 $(RUN) setup.py -q build --build-lib build/emulated --build-temp build/emulated-objects
	PYTHONSAFEPATH=1 PYTHONPATH=build/emulated:. $(PYTEST) $(addprefix tests/test_,$(addsuffix .py,$(OPERATORS)))

# On a machine with a GPU, in an environment that has a torch with CUDA: builds, runs all tests on the device, runs the
# kernels under compute-sanitizer, measures, and writes bench/results/<GPU>.json.
gpu-check:
	$(PYTHON) -m bench.gpu_check

bench: $(VENV)/built
	$(RUN) -m bench run

# The README's tables and charts, from the result files that it names.
readme-figures: $(VENV)/built
	$(RUN) -m bench readme

# Runs the table of tests/compatibility and writes docs/compatibility.md.
compatibility: $(VENV)/built
	$(RUN) -W ignore -m tests.compatibility

# Registers, shared and local memory of the CUDA kernels that were built.
resources: $(VENV)/built
	$(RUN) -m pip install -q nvidia-cuda-cuobjdump==13.5.37
	$(RUN) -m bench.resources

$(VENV)/built: $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(RUN) -m pip install -q "$(TORCH)" ninja pybind11
	$(RUN) -m pip install -q --no-build-isolation -e ".[test,examples,bench,peers]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info cross_entropy/*.so
