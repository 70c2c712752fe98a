# make demo   install what is needed into .venv and run the demonstration
# make test   install, then run the tests of every day
# make test-all   the same, then run all tests: full products of parameters, whole demonstrations, kills at any time
# make test-device-versions   the tests that need no GPU with the GPU machine's versions, in build/device-versions/
# make wheel  the wheels in dist/: their sizes, and that they hold what they must
# make docs   the API reference and the documents as HTML, in build/docs
# make lint   ruff, mypy and clang-format
# make canaries   plant thirteen bugs in the kernels and see a test catch each
# make sanitize   the CPU tests under ASan and UBSan, and five planted bugs that these must catch
# make compile-gate   compile every kernel for every target without a GPU, and read the machine code: build/compile-gate/
# make gpu WINDOW=1 OUT=DIR   on a machine with a GPU: tests and rows in 330 s, WINDOW=2 and 3 in 360; nothing is installed
#                             DRY=1 runs it on a CPU, LIST=1 only prints the jobs; ONLY=REGEX, MODELS=8B,70B
# make gpu-tune OUT=DIR       sweep the launch tables there
# make gpu-record OUT=DIR     merge what came back into bench/results/gpu-<device>.json
# make bench  the benchmarks of bench/ (pytest-benchmark); writes bench/results/cpu.json
# make bench-attribution   the same for attribution over many prompts; writes bench/results/attribution.json
# make bench-eval   the same for a sweep of multipliers; writes bench/results/eval.json
# make bench-embedding   the same for the engine attached to transformers; writes bench/results/embedding.json
# make bench-host   the same for the host's time of a call; writes bench/results/host.json
# make train-demo   train the bundled checkpoints again, into demo-checkpoints/

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-device-versions wheel docs lint canaries sanitize compile-gate gpu gpu-tune gpu-record bench \
        bench-attribution bench-eval bench-embedding bench-host train-demo clean

demo: .venv/.installed
	$(BIN)/cna demo --out demo-out

# As many workers as cores, each on one thread: threads that wait for each other spin, and would take from the others.
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test: .venv/.installed-test
	$(TEST)

test-all: .venv/.installed-test
	$(TEST) -m ''

# DEVICE_PYTHON: the first Python 3.12 that starts. Where pyenv has one that is not chosen, its python3.12 does not.
DEVICE_PYTHON ?= $(shell for python in python3.12 "$$(pyenv root)"/versions/3.12.*/bin/python3; do \
  "$$python" -c "" && echo "$$python" && break; done 2>/dev/null)
DEVICE := build/device-versions
DEVICE_TEST = OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(DEVICE)/bin/python -m pytest -n auto --maxprocesses 8 -rs

# Triton 3.6's interpreter fails with the machine's numpy. The tests that skips run afterwards, with an older numpy.
test-device-versions: $(DEVICE)/.installed-library
	$(DEVICE_TEST) --dist loadfile -m ''
	PYTHONPATH=$(CURDIR)/$(DEVICE)/numpy-2.3 $(DEVICE_TEST) -m interpreted

$(DEVICE)/.installed: tests/bench/device_environment.py constraints-device.txt pyproject.toml
	@test -n "$(DEVICE_PYTHON)" || { \
	  echo "test-device-versions: no Python 3.12 here, which the GPU machine has; give one as DEVICE_PYTHON=..."; exit 2; }
	$(DEVICE_PYTHON) tests/bench/device_environment.py $(DEVICE)
	touch $@

$(DEVICE)/.installed-library: $(DEVICE)/.installed setup.py $(wildcard csrc/*.h csrc/*.cpp)
	$(DEVICE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

wheel: $(BIN)/python
	$(BIN)/python tests/packaging/build_wheel.py dist

docs: .venv/.installed-test
	$(BIN)/python docs/build.py

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h examples/c/*.c

canaries: .venv/.installed-test
	$(BIN)/python tests/kernels/canaries.py

sanitize: .venv/.installed-test
	$(BIN)/python tests/csrc/sanitize.py $(SANITIZE_FLAGS)

# TRITONS: the versions to compile with. The one in .venv is "installed"; any other is unpacked into build/ from its wheel.
TRITONS ?= installed 3.6.0
GATE = $(BIN)/python bench/gate/compile_gate.py --out build/compile-gate $(GATE_FLAGS)

compile-gate: .venv/.installed-test
	set -e; for version in $(TRITONS); do \
	  if [ $$version = installed ]; then $(GATE); else \
	    if $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	        --target build/triton-$$version triton==$$version; \
	    then PYTHONPATH=build/triton-$$version $(GATE); \
	    else echo "compile-gate: no wheel of triton $$version for this Python; not compiled with it"; fi; fi; done

# No virtual environment: the machine's own torch and triton. CNA_COMMIT says what is measured where there is no .git.
OUT ?= build/gpu
WINDOW ?= 1
COMMIT = $(or $(CNA_COMMIT),$(shell git describe --always --dirty --abbrev=12 2>/dev/null))
GPU_FLAGS = --commit '$(COMMIT)' $(if $(DRY),--dry) $(if $(LIST),--list) $(if $(ONLY),--only '$(ONLY)') \
            $(if $(MODELS),--models '$(MODELS)')

# The machine with the GPU has torch, and nothing is installed there. A dry run is one on a machine that may not have it.
gpu gpu-tune: $(if $(DRY)$(LIST),.venv/.installed-test)
	$(if $(DRY)$(LIST),$(BIN)/python,$(PYTHON)) bench/gpu/gpu.py --window $(if $(filter gpu-tune,$@),tune,$(WINDOW)) --out $(OUT) $(GPU_FLAGS)

gpu-record:
	$(PYTHON) bench/gpu/gpu.py --record $(OUT)

# The CPU benches run again with both sides held to AVX-512 without bf16 products, where the CPU has more than that.
BENCH = $(BIN)/python -m pytest -s --benchmark-enable --benchmark-columns=min,median,iqr,rounds
NO_BF16 = CNA_CPU_ISA=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE CNA_BENCH_SETTING="AVX-512 without bf16 products"

bench: .venv/.installed-test
	$(BENCH) bench $(addprefix --ignore=bench/,cpu/bench_host.py $(addprefix model/bench_,attribution.py evaluation.py embedding.py))
	@if $(BIN)/python -c 'from cna_kernels.cpu import library; exit("avx512_bf16" not in library.levels())'; then \
	  $(NO_BF16) $(BENCH) bench/cpu/bench_cpu.py bench/model/bench_cpu_model.py; fi

bench-attribution: .venv/.installed-test
	$(BENCH) bench/model/bench_attribution.py

bench-eval: .venv/.installed-test
	$(BENCH) bench/model/bench_evaluation.py

bench-embedding: .venv/.installed-test
	$(BENCH) bench/model/bench_embedding.py

bench-host: .venv/.installed-test
	$(BENCH) bench/cpu/bench_host.py

train-demo: .venv/.installed
	$(BIN)/python -m cna_kernels.model.demo.train --out demo-checkpoints

clean:
	rm -rf .venv build dist *.egg-info demo-out demo-checkpoints

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.installed: $(BIN)/python pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*.cpp)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[model,plot]"
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@
