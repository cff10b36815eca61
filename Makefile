# Entry points for people and CI. `make` lists them.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The fleet that `up` and `down` are about. Another name gives a second fleet, with
# addresses of its own, beside the first.
FLEET ?= $(or $(CELLBLOCK_FLEET),local)
export CELLBLOCK_FLEET := $(FLEET)
# The molecule scenario to run; empty for all.
SCENARIO ?=

export PATH := $(CURDIR)/.venv/bin:$(PATH)
STEP := scripts/step
# Molecule looks for its base configuration in git checkouts only, unless told where it is.
MOLECULE := molecule --base-config .config/molecule/config.yml
SHELL_SCRIPTS := .ci/run $(shell grep -lE '^\#!.*[ /](ba)?sh' -r scripts roles/*/files)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Get what the other targets need: system packages, .venv, collections
	@$(STEP) setup scripts/setup

.PHONY: up
up: setup ## Start the local fleet, provision it, run two jobs, prove who reaches whom (FLEET=name)
	@$(STEP) "create the fleet" ansible-playbook playbooks/local-fleet-create.yml
	@$(STEP) "provision the hosts" ansible-playbook playbooks/site.yml
	@$(STEP) "run example jobs" ansible-playbook playbooks/run-job.yml \
	    -e '{"job": ["jobs/hello-c.yml", "jobs/hello-python.yml"]}'
	@$(STEP) "verify the isolation" ansible-playbook playbooks/verify-isolation.yml
	@scripts/next-steps

.PHONY: down
down: ## Remove the local fleet: its containers, networks and volumes (FLEET=name)
	@scripts/down

.PHONY: test
test: setup lint unit mutation molecule ## Run every check and test

.PHONY: lint
lint: ## Check style, types, documentation and syntax
	@$(STEP) "ruff check" ruff check --quiet .
	@$(STEP) "ruff format" ruff format --quiet --check .
	@$(STEP) mypy mypy
	@$(STEP) "documents up to date" python scripts/generate_docs.py --check
	@$(STEP) yamllint yamllint --strict .
	@$(STEP) "bash -n" bash -c 'for script in "$$@"; do bash -n "$$script"; done' - $(SHELL_SCRIPTS)
	@$(STEP) "ansible-doc" scripts/check-ansible-docs
	@$(STEP) "changelog" antsibull-changelog lint
	@$(STEP) "playbook syntax" scripts/check-playbooks
	@$(STEP) "ansible-lint" ansible-lint -q

.PHONY: unit
unit: ## Run the unit tests
	@$(STEP) "unit tests" python -m pytest -p no:testinfra

.PHONY: mutation
mutation: setup ## See whether each rule that isolates is missed when it is weakened
	@$(STEP) "mutation test" python tests/mutation/run.py

.PHONY: molecule
molecule: ## Test on a fleet made for it (SCENARIO=name for one)
# An interrupted run leaves hosts, and a note that they are ready to be tested.
	@$(STEP) "remove old test hosts" $(MOLECULE) destroy --no-command-borders --no-report
	@$(STEP) molecule $(MOLECULE) test --no-command-borders $(if $(SCENARIO),--scenario-name $(SCENARIO),--all)

.PHONY: collection
collection: setup ## Build the artifact of the collection, install it elsewhere and run a job with it
	@$(STEP) "build the artifact" python scripts/build_collection.py
	@$(STEP) "try the artifact" python tests/collection/run.py .cache/collection/*.tar.gz

.PHONY: docs
docs: ## Write the documents that are made from the code
	@$(STEP) docs python scripts/generate_docs.py
	@$(STEP) changelog antsibull-changelog generate

.PHONY: bench
bench: setup ## Measure what the local fleet costs, on a fleet of its own
	@python bench/measure.py

.PHONY: lock
lock: ## Renew requirements.txt from requirements.in
	@$(STEP) lock scripts/lock

.PHONY: clean
clean: ## Remove .venv and everything downloaded or built here (first: make down)
	rm -rf .venv .ansible .cache .mypy_cache .pytest_cache .ruff_cache
