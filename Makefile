# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help setup tools demo test bench lint format serve protos docs clean
help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first: with it in place no other package can pull a build with gigabytes of CUDA.
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[server,tracing,dev]'
	touch $@

setup: $(INSTALLED) tools ## Make .venv, install the programs that tests drive

tools: ## Prometheus and Chromium, which some tests drive, if this is Debian or Ubuntu and we may
	scripts/install_test_tools.sh

demo: $(INSTALLED) ## Photographs through a server to a separate LM process, compared with the whole model
	$(BIN)/python scripts/demo.py $(ARGS)

test: setup ## Run the tests, on all cores (ARGS="-n 0 -k … tests/…")
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

bench: $(INSTALLED) ## Our encoders beside transformers' (ARGS="--families qwen2_5_vl --sizes 448 …")
	$(BIN)/python benchmarks/encoder.py $(ARGS)

lint: $(INSTALLED) ## ruff, mypy --strict, the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: $(INSTALLED) ## Start a server (ARGS="--model DIR --port 50051 …")
	$(BIN)/encoder-svc serve $(ARGS)

protos: ## Generate encoder_svc/_generated from protos/
	scripts/make_protos.sh

docs: $(INSTALLED) ## Generate the list in docs/metrics.md and Grafana's dashboard from the code
	$(BIN)/python -m encoder_svc.observability.describe docs/metrics.md
	$(BIN)/python scripts/dashboard > deploy/grafana/encoder-latency.json

clean: ## Remove .venv and caches
	rm -rf $(VENV) .venv-protos .pytest_cache .mypy_cache .ruff_cache .hypothesis
