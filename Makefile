# Needs python3 (≥ 3.11, with venv and pip) and make. Everything else goes into .venv, from the hashed lock.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SOURCES := controlplane agent lab bench migrations tests

.DEFAULT_GOAL := help
.PHONY: help demo demo-check test check gates format bench bench-failover lock manifests openapi packages clean

help: ## Show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(INSTALLED) packages ## Two clusters, one application: starts in the foreground, Ctrl-C stops everything
	@$(BIN)/python -m lab.demo $(ARGS)

demo-check: $(INSTALLED) packages ## The demo, verified and stopped; the exit status says it all
	@$(BIN)/python -m lab.demo --check $(ARGS)

test: $(INSTALLED) packages ## The whole suite, in three streams; ARGS go to pytest: make test ARGS='-k wire'
	@$(BIN)/python -m pytest -n 3 $(ARGS)

check: gates packages ## Format, lint, types, imports, drift, and all tests but the end-to-end ones
	$(BIN)/python -m pytest -q --ignore=tests/e2e $(ARGS)

gates: $(INSTALLED) ## What `check` does before its tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/isthmus-controlplane openapi | diff -u openapi/openapi.json - || { echo 'openapi/ is stale: make openapi'; exit 1; }

format: $(INSTALLED) ## Format, and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED) packages ## All benchmarks into bench/RESULTS.md; one part: make bench ARGS=dataplane
	@$(BIN)/python -m bench $(ARGS)

bench-failover: $(INSTALLED) packages ## What users notice when parts fail, into bench/FAILOVER.md; within 15 minutes: ARGS=--quick
	@$(BIN)/python -m bench.failover $(ARGS)

openapi: $(INSTALLED) ## Export the API's description
	$(BIN)/isthmus-controlplane openapi > openapi/.new.json && mv openapi/.new.json openapi/openapi.json

manifests: ## Build what the control plane hands out to install agents, from deploy/kubernetes; needs kubectl
	for overlay in one-replica three-replicas; do \
		kubectl kustomize deploy/kubernetes/agent/overlays/$$overlay > controlplane/installation/$$overlay.yaml || exit 1; done

COMPILE := $(BIN)/uv pip compile --quiet pyproject.toml --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command 'make lock'

lock: $(INSTALLED) ## Resolve the dependencies anew: for development, and the parts of it that containers need
	$(COMPILE) --extra dev --upgrade -o requirements.lock
	for part in build controlplane agent; do $(COMPILE) --extra $$part --constraint requirements.lock -o deploy/containers/$$part.lock || exit 1; done

packages:
	@.ci/packages

clean: ## Remove what was built
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The stamp makes later runs cost nothing. Build isolation would fetch hatchling unhashed, so it comes from the lock too.
$(INSTALLED): requirements.lock pyproject.toml
	@test -x $(BIN)/python || { echo 'Creating .venv …'; $(PYTHON) -m venv .venv; }
	@echo 'Installing what requirements.lock names (once) …'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
