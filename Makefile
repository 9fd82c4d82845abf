# Everything runs from .venv, which is made from pyproject.toml with the exact versions of constraints.txt.
# On a machine with a GPU take the newest releases instead: make CONSTRAINTS= test
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
PY := .venv/bin/python
STAMP := .venv/.installed
# Of the targets that train: where to, and settings for each training (make train-emoji ARGS="seed=1").
RUNS ?= runs
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint train-emoji bundle clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

$(STAMP): pyproject.toml setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Python {sys.version.split()[0]} came, 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	@touch $@

.venv: $(STAMP)  ## the virtual environment alone

demo: $(STAMP)  ## sample the bundled model: outputs/demo/grid.png
	rm -rf outputs/demo
	$(PY) sample.py prompts_file=configs/prompts/demo.txt output=outputs/demo

lint: $(STAMP)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

test: lint  ## lint, then all tests but those marked slow or gpu
	$(PY) -m pytest

test-slow: lint  ## lint, then all tests, the slow ones too; those marked gpu where there is one
	$(PY) -m pytest -m "$$($(PY) -c 'import torch; print("slow or gpu or not slow" if torch.cuda.is_available() else "not gpu")')"

train-emoji: $(STAMP)  ## train both stages on the emoji that come with it
	$(PY) train.py experiment=emoji/autoencoder output=$(RUNS)/autoencoder $(ARGS)
	$(PY) train.py experiment=emoji/diffusion autoencoder.weights=$(RUNS)/autoencoder output=$(RUNS)/diffusion $(ARGS)

bundle: $(STAMP)  ## train the bundled model anew, on a GPU: runs/bundle
	$(PY) train.py experiment=emoji/autoencoder_gpu output=$(RUNS)/autoencoder $(ARGS)
	$(PY) train.py experiment=emoji/diffusion_gpu autoencoder.weights=$(RUNS)/autoencoder output=$(RUNS)/unet $(ARGS)
	$(PY) train.py experiment=emoji/decoder init=$(RUNS)/autoencoder output=$(RUNS)/decoder $(ARGS)
	$(PY) train.py experiment=emoji/decoder_gpu init=$(RUNS)/decoder output=$(RUNS)/decoder_gpu $(ARGS)
	cp -r ldm/assets/emoji $(RUNS)/bundle    # for its text tower
	$(PY) -m tests.tools.make_bundle $(RUNS)/unet $(RUNS)/bundle 3
	$(PY) -m tests.tools.make_bundle $(RUNS)/decoder_gpu $(RUNS)/bundle

clean:  ## remove caches and builds; keeps .venv and outputs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
