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
# With KEEP=1, `molecule` tests the fleet of SCENARIO that is up, provisioned anew, and leaves it.
KEEP ?=

export PATH := $(CURDIR)/.venv/bin:$(PATH)
STEP := scripts/step
SCENARIOS := fleet segmented_networks vm
SHELL_SCRIPTS := .ci/run $(shell grep -lE '^\#!.*[ /](ba)?sh' -r scripts roles/*/files)
# A subcommand of molecule on a scenario. It looks for its base configuration in git checkouts only, unless
# told where it is, and would keep its notes where a checkout of the same name has them too.
molecule = MOLECULE_EPHEMERAL_DIRECTORY=$(CURDIR)/.ansible/molecule/$(1) molecule \
    --base-config .config/molecule/config.yml $(2) --no-command-borders --no-report --scenario-name $(1)

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
test: ## Run every check and test; what each step took is shown at the end
	@scripts/test

.PHONY: nightly
nightly: ## Likewise, with what takes long: all ports, all limits on the emulated machine, more jobs
	@CELLBLOCK_TEST_THOROUGH=1 scripts/test

.PHONY: quick
quick: ## Lint what differs from main, and run the unit tests
	@$(MAKE) --no-print-directory -j2 quick-lint unit

.PHONY: quick-lint
quick-lint:
	@$(STEP) "lint of what changed" scripts/check-changed

.PHONY: lint
lint: lint-python lint-ansible ## Check style, types, documentation and syntax

.PHONY: lint-python
lint-python:
	@$(STEP) "ruff check" ruff check --quiet .
	@$(STEP) "ruff format" ruff format --quiet --check .
	@$(STEP) mypy mypy
	@$(STEP) "documents up to date" python scripts/generate_docs.py --check
	@$(STEP) "bash -n" bash -c 'for script in "$$@"; do bash -n "$$script"; done' - $(SHELL_SCRIPTS)
	@$(STEP) changelog antsibull-changelog lint

# ansible-lint checks the syntax of every playbook, and has yamllint's rules for what it reads.
.PHONY: lint-ansible
lint-ansible:
	@$(STEP) yamllint yamllint --strict .
	@$(STEP) ansible-doc scripts/check-ansible-docs
	@$(STEP) ansible-lint ansible-lint -q

# They wait more than they compute.
.PHONY: unit
unit: ## Run the unit tests
	@$(STEP) "unit tests" python -m pytest -p no:testinfra -n 4

.PHONY: mutation
mutation: setup ## See whether each rule that isolates is missed when it is weakened
	@$(STEP) "mutation test" python tests/mutation/run.py

.PHONY: molecule
molecule: ## Test on a fleet made for it (SCENARIO=name for one, with KEEP=1 on the fleet that is up)
ifeq ($(KEEP),)
	@$(foreach name,$(or $(SCENARIO),$(SCENARIOS)),$(STEP) "$(name)" env $(call molecule,$(name),test) && ) true
else
	@$(STEP) "$(SCENARIO): provision" env $(call molecule,$(SCENARIO),converge)
	@$(STEP) "$(SCENARIO): tests" env $(call molecule,$(SCENARIO),verify)
endif

# What `make test` runs side by side after `setup`, two at a time: the fleet of the containers' tests, and
# beside it, one after the other, all the rest. What two steps would both build (images, archives) is there before
# the second begins. A dash: what comes later is to be seen as well; scripts/test tells a failure by the table.
.PHONY: steps step-python step-unit step-lint step-mutation step-fleet-create step-fleet-provision step-fleet-test \
    step-collection step-segmented step-vm
steps: step-fleet-test step-vm
step-python:
	-@$(MAKE) --no-print-directory lint-python
step-unit: step-python
	-@$(MAKE) --no-print-directory unit
step-lint: step-unit
	-@$(MAKE) --no-print-directory lint-ansible
step-fleet-create:
	@$(STEP) "fleet: remove an old one" env $(call molecule,fleet,destroy)
	@$(STEP) "fleet: create" env $(call molecule,fleet,create)
step-fleet-provision: step-fleet-create
	@$(STEP) "fleet: dry run" env $(call molecule,fleet,check)
	@$(STEP) "fleet: provision" env $(call molecule,fleet,converge)
step-fleet-test: step-fleet-provision
	-@$(STEP) "fleet: second run" env $(call molecule,fleet,idempotence)
	-@$(STEP) "fleet: tests" env $(call molecule,fleet,verify)
	@$(STEP) "fleet: remove" env $(call molecule,fleet,destroy)
step-mutation: step-fleet-create step-lint
	-@$(STEP) "mutation test" python tests/mutation/run.py
step-collection: step-fleet-provision step-mutation
	-@$(STEP) "collection, installed" python tests/collection/run.py
step-segmented: step-collection
	-@$(STEP) segmented_networks env $(call molecule,segmented_networks,test)
step-vm: step-segmented
	@$(STEP) vm env $(call molecule,vm,test)

.PHONY: remove-test-fleets
remove-test-fleets:
	@$(foreach name,$(SCENARIOS),$(STEP) "remove $(name)" env $(call molecule,$(name),destroy) && ) true

.PHONY: collection
collection: setup ## Build the artifact of the collection, install it elsewhere and run a job with it
	@$(STEP) "build the artifact" python scripts/build_collection.py
	@$(STEP) "try the artifact" python tests/collection/run.py .cache/collection/cellblock-fleet-*.tar.gz

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
