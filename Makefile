# What a person types. `make` alone lists it.

FUNCTIONS := seed-buckets remove-buckets build-ami add-plot-steps refresh-notebook
STACKS := hail-s3 hail-jupyter hail-ami hail-emr

# Compiled code and Python packages are kept here: in the home folder's cache where that has a folder for them
# (mkdir -p ~/.cache/hail-emr), so that another checkout need not make them again, else below build/.
CACHE ?= $(or $(wildcard $(HOME)/.cache/hail-emr),$(CURDIR)/build/cache)
export CARGO_TARGET_DIR := $(CACHE)/target
PYTHON ?= python3
VENV := $(CACHE)/venv-$(shell cksum tests/requirements.txt | cut -d' ' -f1)
RUN := $(VENV)/bin/python

# What plots take, in two environments: the notebook's, and the cluster's, which is the one of the AMI, made by the
# same script from the same pins.
PLOTS := $(CACHE)/plots-$(shell cksum tests/plots/requirements.txt | cut -d' ' -f1)
RUN_PLOTS := $(PLOTS)/bin/python
HAIL_VERSION := 0.2.139
HAIL := $(CACHE)/hail-$(shell cksum packer/requirements/hail-$(HAIL_VERSION).txt | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help demo demo-stacks demo-plots notebook test test-plots lint fmt digest build build-local package $(STACKS:%=deploy-%) local local-stop clean

help: ## List these targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  make deploy-STACK   Deploy one of $(STACKS): CODE_BUCKET=... PARAMETERS="Name=value ..."'

demo: ## Deploy, update and delete the four stacks on this machine, without AWS; then the plotting example
	@$(MAKE) --no-print-directory demo-stacks
	@$(MAKE) --no-print-directory demo-plots

demo-stacks: build-local $(VENV)/installed ## The stacks alone
	PYTHONPATH=tests $(RUN) tests/demo.py --built build/local

demo-plots: $(PLOTS)/installed $(HAIL)/installed ## The plotting example alone, executed; build/plots/ then has what a person sees
	$(RUN_PLOTS) tests/plots demo --hail $(HAIL) --target build/plots

notebook: $(PLOTS)/installed $(HAIL)/installed ## JupyterLab in the browser, with a cluster of this machine, to make plots in
	$(RUN_PLOTS) tests/plots notebook --hail $(HAIL)

test: lint build-local $(VENV)/installed ## Everything that must hold
	cargo test --locked
	PYTHONPATH=tests HAIL_EMR_BUILT=$(CURDIR)/build/local $(RUN) -m pytest -ra --ignore=tests/plots tests
	@$(MAKE) --no-print-directory test-plots

test-plots: $(PLOTS)/installed $(HAIL)/installed ## The plots alone: real Spark, Hail, sparkmagic, web server and browser, a stand-in for Livy
	HAIL_EMR_HAIL=$(HAIL) $(RUN_PLOTS) -m pytest -ra --confcutdir=tests/plots tests/plots

lint: ## Formatting, and the compiler's and clippy's warnings
	cargo fmt --check
	cargo clippy --locked --all-targets -- --deny warnings

fmt: ## Format the Rust code
	cargo fmt

digest: ## Write what is derived from other files (digests, the table of versions), after changing any of them
	$(PYTHON) tests/compatibility_table.py --write
	$(PYTHON) tests/assets_digest.py --write

# What the templates' FunctionArchitecture says: arm64, which costs a fifth less, or x86_64. cargo-lambda brings the
# linker.
ARCHITECTURE ?= arm64
build: ## Build the functions for AWS Lambda
	@cargo lambda --version > /dev/null || { echo "Building for Lambda takes cargo-lambda: pip install cargo-lambda"; exit 2; }
	cargo lambda build --locked --release --$(subst _,-,$(ARCHITECTURE))
	@$(call stage,$(CARGO_TARGET_DIR)/lambda,/bootstrap,build)

build-local: ## Build the functions for this machine
	cargo build --locked --bins
	@$(call stage,$(CARGO_TARGET_DIR)/debug,,build/local)

# $(call stage,folder of the binaries,what follows a binary's name,where to): a folder per function as Lambda gets
# it, with what seed-buckets ships beside its binary.
define stage
	set -e; for function in $(FUNCTIONS); do \
	  rm -rf $(3)/$$function; mkdir -p $(3)/$$function; \
	  cp -p $(1)/$$function$(2) $(3)/$$function/bootstrap; \
	done; \
	assets=$(3)/seed-buckets/assets; mkdir -p $$assets; \
	cp -Rp jupyter/common-notebooks jupyter/scripts packer $$assets; cp -Rp packer/vep $$assets; \
	find $$assets \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
endef

.PHONY: can-package
can-package:
	@test -n "$(CODE_BUCKET)" || { echo "usage: make package CODE_BUCKET=a-bucket-of-yours"; exit 2; }
	@$(PYTHON) tests/assets_digest.py > /dev/null

package: can-package build ## Upload the functions to CODE_BUCKET; build/packaged/ then has templates that any launch takes
	mkdir -p build/packaged
	set -e; for stack in $(STACKS); do \
	  aws cloudformation package --template-file templates/$$stack.yml --s3-bucket "$(CODE_BUCKET)" \
	    --s3-prefix hail-emr --output-template-file build/packaged/$$stack.yml > /dev/null; \
	done
	@echo "build/packaged has the templates to launch."

$(STACKS:%=deploy-%): deploy-%: package
	aws cloudformation deploy --template-file build/packaged/$*.yml --stack-name $* --capabilities CAPABILITY_IAM \
	  --no-fail-on-empty-changeset $(if $(PARAMETERS),--parameter-overrides $(PARAMETERS))

local: $(VENV)/installed ## Start a local AWS that ends with this shell; build/aws/env has the variables to source
	@PYTHONPATH=tests $(RUN) -m local_aws start --folder build/aws --with-pid $$(ps -o ppid= -p $$PPID)

local-stop: $(VENV)/installed ## Stop it
	@PYTHONPATH=tests $(RUN) -m local_aws stop --folder build/aws

# The stamp is written last: an installation that was cut off is begun anew.
$(VENV)/installed: tests/requirements.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r tests/requirements.txt
	touch $@

# Without the packages of sparkmagic for Kerberos that would have to be compiled (see requirements.in), hence --no-deps.
$(PLOTS)/installed: tests/plots/requirements.txt
	rm -rf $(PLOTS)
	$(PYTHON) -m venv $(PLOTS)
	$(RUN_PLOTS) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r tests/plots/requirements.txt
	$(PLOTS)/bin/jupyter kernelspec install --sys-prefix --log-level=ERROR $$($(RUN_PLOTS) -c 'import pathlib, sparkmagic; print(pathlib.Path(sparkmagic.__file__).parent)')/kernels/pysparkkernel
	touch $@

$(HAIL)/installed: packer/requirements/hail-$(HAIL_VERSION).txt
	@echo "Installing Spark and Hail takes two to three minutes and 1.8 GB."
	rm -rf $(HAIL)
	SOURCES=$(CURDIR)/packer PREFIX=$(HAIL) HAIL_VERSION=$(HAIL_VERSION) PYTHON_VERSION=3.11 bash packer/scripts/hail.sh > $(CACHE)/hail-install.log || { tail -n 20 $(CACHE)/hail-install.log; exit 1; }
	touch $@

clean: ## Remove what was built here
	rm -rf build target
