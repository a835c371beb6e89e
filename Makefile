# make demo | test | bench | lint | gpu; each sets up .venv first where it is needed.
#
# TORCH   the torch to install, before everything else, so that nothing pulls another one
# EXTRAS  what is installed beside the package (pyproject.toml)
# PYTHON  the interpreter that makes .venv; found by itself if it is 3.11 or newer

TORCH ?= torch==2.13.0
EXTRAS ?= train,test,triton,dev
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

SHELL := /bin/bash
BIN := .venv/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: setup demo test bench results lint format gpu clean
.DELETE_ON_ERROR:

setup: .venv/.installed

# An edit to a native source reinstalls, which rebuilds rlhf_fast._C in place.
.venv/.installed: $(SOURCES)
	@test -n "$(PYTHON)" || { echo "needs Python >= 3.11 (make PYTHON=/path/to/python3.12)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	echo "$(TORCH)" > .venv/constraints.txt
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c .venv/constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: setup
	$(BIN)/rlhf-fast demo

# One worker per core; OpenMP threads that wait must not spin, for they share the cores.
test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --maxprocesses 8 $(PYTEST_FLAGS)

# Times every op on this machine; see docs/RESULTS.md for the kept ones.
bench: setup
	mkdir -p build
	$(BIN)/rlhf-fast bench --json build/bench.json

# Keeps a run: for an idle machine and a clean checkout.
results: setup
	mkdir -p benchmarks/results
	$(BIN)/rlhf-fast bench --json benchmarks/results
	$(BIN)/python benchmarks/report.py

# The three greps are rules no linter knows: native code that includes torch would be tied to one
# torch version, and a package called `kernels` here would hide Hugging Face's from transformers.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p rlhf_fast
	@find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
		| xargs --no-run-if-empty $(BIN)/clang-format --dry-run -Werror
	@! grep -rnE '#include *[<"](torch|ATen|c10)/' csrc
	@! grep -rnE '^ *(import kernels|from kernels)' --include='*.py' kernels rlhf_fast tests benchmarks
	@! test -e kernels/__init__.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
		| xargs --no-run-if-empty $(BIN)/clang-format -i

# Uses the Python, torch and nvcc of the machine, not .venv.
gpu:
	scripts/gpu_check.sh build/gpu

clean:
	rm -rf build rlhf_fast/_C*.so .venv/.installed
