# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Every target installs what it needs first: the tools into .venv, and, where it is run as root on Debian, the packages.
# ARGS goes to the program behind a target, as in: make unit ARGS="-k plan"

.DEFAULT_GOAL := help
.PHONY: help demo test lint format sanity unit fuzz integration molecule system thorough torture crashes package confined versions matrix docs pictures bench lock release clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: ## Back up a real Linux guest while it writes, and look into the backup; with LIBVIRT=1 a domain of libvirt (root)
	@tools/setup vm
	@tools/tree demo/$(if $(LIBVIRT),libvirt,run) $(ARGS)

test: ## Run all the checks below and show a summary
	@tools/setup vm
	@.venv/bin/python tools/check lint sanity unit package integration molecule system versions

lint: ## Check style, types, documentation and changelog
sanity: ## Run ansible-test sanity
unit: ## Run the tests that need no QEMU
fuzz: ## Read thousands of odd documents and answers that nobody has thought of, others each time
docs: ## Build the reference documentation into build/docs
lint sanity unit fuzz docs:
	@tools/setup
	@.venv/bin/python tools/check $@ --arguments="$(ARGS)"

integration: ## Run every module against real QEMU (root)
molecule: ## Run the roles over several hypervisors (root)
system: ## Run the tests of crashes and of real guests (root)
thorough: ## Run the tests of both that take too long for `make test` (root)
torture: ## Drive 200 random chains of sets of a QEMU and 200 of a domain, where `make system` drives 25 and 6 (root)
crashes: ## Kill modules, QEMU or both at every hit of every point, where `make test` kills at some (root)
package: ## Build the tarball into dist, install it elsewhere and run its playbook (root)
confined: ## Run the tests in guests with AppArmor, with SELinux, and with NFS and SMB (root)
versions: ## Run the most telling tests with the newest QEMU, and the oldest and newest Ansible and Python (root)
matrix: ## Run the tests with all versions of QEMU, Ansible and Python, or the cells in ARGS; write the table in the guides (root)
integration molecule system thorough torture crashes package confined versions matrix:
	@tools/setup vm
	@.venv/bin/python tools/check $@ --arguments="$(ARGS)"

bench: ## Measure against qemu-img, restic, virtnbdbackup and others, and what there is to do beside copying for many VMs, sets and hypervisors
	@tools/setup bench
	@tools/tree sh -c 'export PYTHONPATH="$$ROOT"; s=0; for b in copy dedup control worker restore info start fleet forks scale libvirt; do benchmarks/$$b $(ARGS) || s=1; done; exit $$s'

format: ## Bring the Python files into shape, mend what ruff can mend, and write the table of steps into its guide
	@tools/setup
	@.venv/bin/ruff check --fix-only .
	@.venv/bin/ruff format .
	@tools/tree sh -c 'PYTHONPATH=$$ROOT python -m ansible_collections.vmfleet.backup.tests.harness.step_table "$$CHECKOUT"'

pictures: ## Make the pictures of the report page that the guides show (needs Chromium)
	@tools/setup vm
	@tools/tree sh -c 'PYTHONPATH=$$ROOT python -m ansible_collections.vmfleet.backup.tests.harness.pictures "$$CHECKOUT/docs/images"'

lock: ## Renew requirements-lock.txt from requirements-dev.txt
	@tools/lock

release: ## Set the VERSION of a release, write the changelog, and say what is next, as in: make release VERSION=1.2.3
	@tools/setup
	@tools/release "$(VERSION)"

clean: ## Remove all that these targets made here
	rm -rf .venv .ansible .mypy_cache .pytest_cache .ruff_cache build dist tests/output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
