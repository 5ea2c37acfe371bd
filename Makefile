# make demo   install, prepare real text, train a small sparse model on 2 ranks, stop, resume, evaluate, generate
# make test   install, lint, type-check, run every test
# make slurm  all tests on a real SLURM of this machine's own; as root, by apt-get. make soak: those of many minutes
# PIP_ARGS    more for pip, e.g. an index that holds a CPU build of torch
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRAIN := $(BIN)/deepspeed --quiet --num_accelerators 2 pretrain/main.py --config configs/demo.yaml
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo test slurm soak clean
install: $(VENV)/installed

$(VENV)/installed: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "found: $$($(PYTHON) --version); expected: Python 3.10 or newer; remedy: make PYTHON=python3.11 ..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "found: no venv module; expected: one; remedy: apt-get install python3-venv"; rm -rf $(VENV); exit 2; }
	@echo "Installing into $(VENV) (a few minutes at most)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e ".[dev]"
	@touch $@

demo: install
	@echo "== 1/6 Python's own library -> tokenizer and token shards"
	@$(BIN)/glam prep configs/corpus_demo.yaml
	@echo "== 2/6 train on 2 ranks, experts spread over both; stop half-way on purpose"
	@$(TRAIN) train.stop_after_steps=250; code=$$?; test $$code -eq 0 -o $$code -eq 3 || exit $$code; \
		echo "(exit code $$code: 3 means stopped on request, state saved)"
	@echo "== 3/6 the same command again: resume from the sharded checkpoint and finish"
	@$(TRAIN)
	@echo "== 4/6 held-out text, against the frequencies of the same tokens"
	@$(BIN)/glam eval runs/demo
	@echo "== 5/6 a sample"
	@$(BIN)/glam generate runs/demo --prompt "def test_" --max-tokens 80
	@echo "== 6/6 the curves"
	@$(BIN)/glam report runs/demo
	@echo "Done. runs/demo holds config.yaml, metrics.jsonl, loss.png, tensorboard/ and checkpoints/"

test: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -rs

slurm: install
	GLAM_TEST_SLURM_INSTALL=1 $(BIN)/python -m pytest -rs tests/slurm_cluster -m "slow or not slow"

soak: install
	GLAM_TEST_SLURM_INSTALL=1 $(BIN)/python -m pytest -rs -s tests/slurm_cluster -m soak

clean:
	rm -rf $(VENV) runs data build *.egg-info
