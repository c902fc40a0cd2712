# On a machine with Python 3.10 to 3.13 and make: `make quickstart`, `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS_VENV ?= .venv-bench
PEERS_INSTALLED := $(PEERS_VENV)/.installed
GPU_VENV ?= .venv-gpu
GPU_INSTALLED := $(GPU_VENV)/.installed
# Where there is no GPU its tests are skipped, and nothing is installed for them.
GPU_READY := $(if $(shell command -v nvidia-smi),$(GPU_INSTALLED),$(INSTALLED))
QUICKSTART ?=
# Two processes, each with whole files of tests: networks are trained once in each.
TEST ?= --numprocesses 2 --dist loadfile
BENCH ?=
REPRODUCE ?= all
NETWORKS ?=

.DEFAULT_GOAL := help
.PHONY: help install quickstart reproduce test test-gpu test-wide fakes soak lint format bench networks clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(INSTALLED) ## Create $(VENV) and install everything into it

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v < (3, 14) else "Python 3.10 to 3.13 is needed, this is %d.%d: make PYTHON=python3.11 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(INSTALLED) ## Train, lower, prove and attack, on real digits (about 4 minutes)
	$(BIN)/ccn-deploy quickstart $(QUICKSTART)

reproduce: $(INSTALLED) ## Rerun the paper's tables and figures: docs/studies.md (100 minutes on two cores)
	$(BIN)/ccn-deploy reproduce $(REPRODUCE)

test: $(INSTALLED) ## Run the tests
	$(BIN)/python -m pytest $(TEST)

test-gpu: $(GPU_READY) ## Run the tests that need an NVIDIA GPU
	$(dir $(GPU_READY))bin/ccn-deploy doctor || true
	$(dir $(GPU_READY))bin/python -m pytest -m gpu -rA

# Apart from $(VENV): onnxruntime and onnxruntime-gpu cannot both be installed. TensorRT comes from
# NVIDIA's own index; without a way there, its tests are skipped and say so.
$(GPU_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[rtx,train,test]' 'onnxruntime-gpu[cuda,cudnn]'
	$(GPU_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[gpu]' || echo 'TensorRT could not be installed; its tests will be skipped.'
	@touch $@

test-wide: $(INSTALLED) ## Derive everything from every published and every kind of own network (25 minutes)
	$(BIN)/python -m pytest -m wide

fakes: $(INSTALLED) ## Judge every planted fake and every unusual honest network (4 minutes)
	CCN_DEPLOY_FAKES_CERTIFY=1 $(BIN)/python -m pytest -m 'fakes or not soak and not wide' tests/test_verdicts.py tests/test_certificates.py

networks: $(INSTALLED) ## Take published networks through every command: docs/networks.md (hours on two cores)
	$(BIN)/python -m tests.campaign $(NETWORKS)

soak: $(INSTALLED) ## Ask one loaded bundle from eight threads for a minute
	$(BIN)/python -m pytest -m soak -s

lint: $(INSTALLED) ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(PEERS_INSTALLED) ## Measure speed as ratios in one run, beside other attack libraries (15 minutes)
	OMP_WAIT_POLICY=PASSIVE $(PEERS_VENV)/bin/python -m benchmarks $(BENCH)

# torchattacks pins an old requests, adv-lib needs torchvision and visdom for what is not measured:
# with their dependencies they would replace what the figures are measured on. They may fail to
# install; the tables then say so.
$(PEERS_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,train]'
	-$(PEERS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	-$(PEERS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps torchattacks adv-lib
	@touch $@

clean: ## Remove the environment and what the quickstart wrote
	rm -rf $(VENV) $(GPU_VENV) quickstart
