# Everything here works from a fresh clone: what is missing is installed first (scripts/bootstrap.sh).

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup images demo demo-ai hello test test-unit test-contract test-containers test-compose test-newer test-sid \
	test-matrix test-integration test-faults test-slow test-mutants test-bare lint format bench docs build golden lock clean

BIN := .venv/bin
PYTEST := $(BIN)/pytest
# Tests of servers wait most of the time: several run side by side (WORKERS=0: one after the other).
BESIDE := scripts/beside.sh $(PYTEST)
TYPED := $(wildcard orthanc_events_bridge tests tools benchmarks examples)
CODE := $(TYPED) typings
# What is asked again in containers: all that is asked of a broker of RabbitMQ, which is another version there, and of the
# others what containers are. What takes longest comes first, so that none of those side by side is left alone with it.
CONTAINED := TEST_SERVERS=containers scripts/docker.sh $(BESIDE) \
	-k "not webhook and not memory and not ((contract or faults) and (nats or kafka))" \
	tests/integration/test_compose.py tests/integration/test_integration_example.py \
	tests/integration/test_orthanc_container.py tests/faults/test_broker.py tests/integration/test_containers.py tests/contract
# The versions of Orthanc and of the brokers that are asked for in pairs.
OTHERS := orthanc-1.10 nats-2.10 rabbitmq-3.10

# What is asked again of a newer Orthanc, which a container has.
NEWER := TEST_ORTHANC=containers scripts/docker.sh $(BESIDE) tests/faults/test_capture.py tests/faults/test_repair.py \
	tests/integration/test_changes.py tests/integration/test_router_labels.py

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what demo and tests need (Debian's packages as root, Python's into .venv)
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh

images: ## build every image of tests and Compose file, where none can be pulled (root; SID=1: Orthanc of Debian sid too)
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh kafka docker
	scripts/docker.sh scripts/images.sh $(if $(SID),nats rabbitmq kafka webhook orthanc consumers orthanc-events ai-service orthanc-sid)

demo: ## CloudEvents out of a real Orthanc (BROKER=nats|rabbitmq|kafka|webhook; KEEP=1: until Ctrl-C; DEMO_FAULT=drop)
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh $(filter rabbitmq kafka,$(BROKER))
	@BROKER="$(BROKER)" KEEP="$(KEEP)" DEMO_FAULT="$(DEMO_FAULT)" $(BIN)/python -m orthanc_events_bridge.testing.demo

demo-ai: ## PACS → gateway → AI service → back: results found in the PACS (BROKER=nats|rabbitmq|kafka; KEEP=1: until Ctrl-C)
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh $(filter rabbitmq kafka,$(BROKER))
	@BROKER="$(BROKER)" KEEP="$(KEEP)" $(BIN)/python -m orthanc_events_bridge.testing.demo_ai

hello: ## a consumer in ten lines, on a real broker (BROKER=nats|rabbitmq|kafka; KEEP=1: until Ctrl-C)
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh $(filter rabbitmq kafka,$(BROKER))
	@BROKER="$(BROKER)" KEEP="$(KEEP)" $(BIN)/python -m orthanc_events_bridge.testing.hello

test: ## every test but the slow, on real servers: as processes, and the brokers' again in containers
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh rabbitmq kafka postgresql docker faketime languages
	$(BESIDE)
	$(CONTAINED)
	scripts/docker.sh sh -c 'scripts/images.sh $(OTHERS) && TEST_SERVERS=containers $(BESIDE) tests/matrix'
	$(NEWER) -k "not kafka and not tight_loop and not late and not twice and not away"

test-unit: setup ## the fast ones: seconds, no servers
	$(PYTEST) tests/unit

test-contract: ## what every transport must do, against real brokers
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh rabbitmq kafka
	$(BESIDE) tests/contract

test-containers: ## contract and faults with brokers in containers (a container engine and images are made first)
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh rabbitmq kafka docker
	$(CONTAINED)

test-compose: ## the Compose file, with images of our own (PROFILE=rabbitmq|kafka|all: with another broker)
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh kafka docker
	TEST_SERVERS=containers scripts/docker.sh $(PYTEST) tests/integration/test_compose.py -m "slow or not slow" \
		-k "[$(or $(PROFILE),nats)]"

test-newer: ## capture, repair and labels with Orthanc 1.12.7 in a container
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh rabbitmq kafka docker
	$(NEWER)

# Plugin 7.1 crashes by itself when Orthanc 1.13.0 stops while changes come in (6 of 6, with a callback that does nothing).
test-sid: ## the same with the newest Orthanc of Debian, whatever it is today
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh rabbitmq kafka docker
	scripts/docker.sh sh -c 'scripts/images.sh orthanc-sid && ORTHANC_EVENTS_IMAGE_ORTHANC=orthanc-sid $(NEWER) \
		-k "not stopped and not stop-nats and not stop-kafka and not older and not twice"'

test-matrix: ## each Orthanc with each version of each broker, in containers; the table in README.md (SID=1: Debian sid too)
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh rabbitmq kafka docker
	scripts/docker.sh sh -c 'scripts/images.sh $(OTHERS) $(if $(SID),orthanc-sid) && code=0 && \
		{ TEST_SERVERS=containers $(PYTEST) -n 2 -m "slow or not slow" $(if $(SID),,-k "not sid") \
		-o junit_family=xunit1 --junitxml build/matrix.xml tests/matrix || code=$$?; } && \
		$(BIN)/python tools/matrix_table.py build/matrix.xml && exit $$code'

test-integration: ## the way from a DICOM file to the stream, on real servers
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh rabbitmq kafka postgresql languages
	$(BESIDE) $(wildcard tests/integration tests/e2e)

test-faults: ## kills, freezes, full disks, on real servers
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh rabbitmq kafka postgresql faketime
	$(BESIDE) tests/faults

test-slow: ## only what `make test` leaves out: the long forms
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh rabbitmq kafka postgresql faketime
	$(PYTEST) --durations=10 -m slow

test-mutants: ## each protection switched off: the ledger must report the harm
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh rabbitmq kafka postgresql
	$(PYTEST) --durations=10 -m mutant

test-bare: ## `make demo` and `make test` in a freshly debootstrapped Debian 12 (root; result in tests/bare/)
	scripts/test-bare.sh

lint: setup ## ruff, mypy, import-linter; whether generated files are up to date, and schemas keep what was released
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(TYPED)
	$(BIN)/lint-imports
	@if [ -e tools/generate_docs.py ]; then set -x; $(BIN)/python tools/generate_docs.py --check; fi
	@if [ -e tools/schema_compatibility.py ]; then set -x; $(BIN)/python tools/schema_compatibility.py; fi

format: setup ## let ruff put the code in order
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: setup ## measure, and write benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

docs: setup ## generate what is declared elsewhere: pages, tables, all schemas, the list of licences
	$(BIN)/python tools/generate_docs.py

build: setup ## what is released, in dist/: the source distribution and the wheel
	$(BIN)/python -m build --no-isolation

golden: setup ## write the golden vectors, tests/golden/, that programs in other languages are tested with
	$(BIN)/python tools/golden.py

lock: setup ## pin the newest allowed versions that are needed, by hash
	scripts/lock.sh

clean: ## remove .venv and the tools' caches
	rm -rf .venv .setup.lock .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
