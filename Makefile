# Everything a newcomer types. `make help` lists it.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export MESH_HOME ?= $(CURDIR)/.mesh
Q ?= What is the capital of France?
N ?= 3
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: help ask up test test-nomad check format protos bench clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 1; }
	@echo "setting up .venv ..."
	@$(PYTHON) -m venv .venv || { echo "the venv module is missing: apt-get install python3-venv"; exit 1; }
	@touch $@

.venv/run: .venv/made pyproject.toml
	@echo "installing packages ..."
	@$(PIP) -e '.[onnx,litert,shard]'
	@touch $@

.venv/dev: .venv/run
	@echo "installing packages for tests ..."
	@$(PIP) -e '.[dev]'
	@touch $@

ask: .venv/run ## one question to three agents: make ask Q="..."
	@$(BIN)/mesh ask --nodes $(N) "$(subst ",\",$(Q))"

up: .venv/run ## keep three agents running
	@$(BIN)/mesh up --nodes $(N)

# The simulator has a clock of its own: its tests take whatever cores are left, while tests that wait for Consul's clock or
# membership's go on before them. The others measure this machine, and run alone.
SIMULATION_LOG := $(MESH_HOME)/simulation-tests.log

test: .venv/dev ## all tests, on the real model and a real Consul
	@tests/fetch_consul.sh $(MESH_HOME)/tools/consul
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@mkdir -p $(MESH_HOME); setsid chrt --idle 0 $(BIN)/python -m pytest -n $(shell nproc) tests/simulation > $(SIMULATION_LOG) 2>&1 & \
	simulation=$$!; trap "kill -- -$$simulation 2> /dev/null" EXIT; \
	$(BIN)/python -m pytest -m waits --ignore tests/simulation && \
	{ wait $$simulation; passed=$$?; cat $(SIMULATION_LOG); exit $$passed; }
	@$(BIN)/python -m pytest -m "not waits" --ignore tests/simulation
endif

test-nomad: .venv/dev ## the jobs on a local fleet; skips by name where there is no nomad
	@tests/fetch_consul.sh $(MESH_HOME)/tools/consul
	@$(BIN)/python -m pytest -s tests/nomad

check: .venv/dev protos ## format, lint, types, imports, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	git diff --exit-code -- protos/gen

format: .venv/dev ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Generated with the lowest versions that pyproject.toml admits: newer ones refuse older runtimes.
.venv/protos/made: .venv/made
	@$(PYTHON) -m venv .venv/protos
	@.venv/protos/bin/pip install --disable-pip-version-check --quiet grpcio-tools==1.76.0 mypy-protobuf==3.7.0
	@touch $@

protos: .venv/protos/made ## generate protos/gen from protos/*.proto
	@PATH=$(CURDIR)/.venv/protos/bin:$$PATH .venv/protos/bin/python -m grpc_tools.protoc -Iprotos/gen=protos \
		--python_out=. --mypy_out=quiet:. --grpc_python_out=. --mypy_grpc_out=quiet:. \
		$(patsubst protos/%,protos/gen/%,$(wildcard protos/*.proto))

bench: .venv/dev ## measure: decode against llama.cpp, quality, footprint (minutes)
	@$(PIP) -e '.[bench]'
	$(BIN)/python -m tests.benchmarks.quality --json
	$(BIN)/python -m tests.benchmarks.footprint --json
	$(BIN)/python -m tests.benchmarks.decode --json

clean: ## remove the environment and the model
	rm -rf .venv .mesh build *.egg-info
