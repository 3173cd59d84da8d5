# Everything installs itself: `make demo` and `make test` are all that a fresh machine needs (Python 3.11 to 3.13, make, git).
# The newest of them that runs; `make PYTHON=...` names another.
PYTHON ?= $(or $(call runs,python3.13 python3.12 python3.11),$(error no python3.13, python3.12 or python3.11 runs here: \
  install one of them, or name one with `make PYTHON=...`))
# The first of some commands that runs. To be found is not enough: a version manager has a file for each version it knows.
runs = $(shell for python in $(1); do $$python -c "" 2> /dev/null && echo $$python && break; done)

# pip says nothing while it works; these files say when it has.
APP := .venv/.installed
SAM := .venv-sam/.installed
LINT := .venv-lint/.installed
DEPLOY := .venv-deploy/.installed
LIGHT = .venv-$(notdir $(PYTHON))
PIP_INSTALL = bin/python -m pip install -qq --disable-pip-version-check

.PHONY: install demo test test-python lint browser deploy soak containers locks clean

install: $(APP) $(SAM)
	@ln -sf ../../.venv-sam/bin/sam .venv/bin/sam

# Makes the environment $(1) with what the lock $(2) lists, and nothing else, whatever is newest today.
define environment
	@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
	@$(1)/$(PIP_INSTALL) pip==26.3
	@$(1)/$(PIP_INSTALL) --require-hashes --no-deps --only-binary=:all: -r $(2)
endef

$(APP): requirements/app.lock requirements/torch.txt pyproject.toml
	@echo "installing the application into .venv"
	$(call environment,.venv,$<)
	@.venv/$(PIP_INSTALL) -r requirements/torch.txt
	@.venv/$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(SAM): requirements/sam.lock
	@echo "installing the SAM CLI into .venv-sam"
	$(call environment,.venv-sam,$<)
	@touch $@

$(LINT): requirements/lint.lock
	@echo "installing the template's linters into .venv-lint"
	$(call environment,.venv-lint,$<)
	@touch $@

$(DEPLOY): requirements/deploy.lock pyproject.toml
	@echo "installing what deploying needs into .venv-deploy"
	$(call environment,.venv-deploy,$<)
	@.venv-deploy/$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(LIGHT)/.installed: requirements/light.lock pyproject.toml
	@echo "installing what the tests without torch need into $(LIGHT)"
	$(call environment,$(LIGHT),$<)
	@$(LIGHT)/$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

# The tests of tests/report open the pages in a browser. Root on Debian and Ubuntu gets one installed; elsewhere, `make test`
# leaves these tests out where there is no browser, and says so.
BROWSER = $(shell command -v chromium || command -v google-chrome)
WITHOUT_BROWSER = $(if $(BROWSER),,--ignore=tests/report)
NO_BROWSER = $(if $(BROWSER),,@echo "no browser: tests/report not run. Install Chromium (on Debian and Ubuntu: \
  apt-get install chromium) or Google Chrome.")
browser:
	@test -n "$(BROWSER)" || test "$$(id -u)" != 0 || ! command -v apt-get > /dev/null \
	  || (echo "installing Chromium" && apt-get update -qq && apt-get install -qq -y chromium > /dev/null) || true

# From a sample dataset to a published model, on this machine.
demo: install
	@.venv/bin/tunedrop demo

lint: install
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy functions trainer release tunedrop_cli local_app tests benchmarks

# Two files of tests at a time; torch's threads would only fight over two cores.
PYTEST = -m pytest -n 2 --dist loadfile

# Every test, and those without torch once more with another Python, where one runs.
OTHER = $(call runs,$(filter-out $(notdir $(PYTHON)),python3.13 python3.12))
test: lint browser $(LINT)
	$(NO_BROWSER)
	OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST) $(WITHOUT_BROWSER)
	$(if $(OTHER),$(MAKE) test-python PYTHON=$(OTHER),@echo "not tested with another Python: of 3.12 and 3.13 none runs here")
	$(NO_BROWSER)

# Python 3.12 and later measure coverage cheaply (sys.monitoring).
COVERAGE = --cov=functions --cov=release --cov=tunedrop_cli

# `make test-python PYTHON=python3.12`: the tests of what runs without torch: the command, the functions, the template.
test-python: $(LIGHT)/.installed $(SAM) $(LINT)
	COVERAGE_CORE=sysmon $(LIGHT)/bin/python $(PYTEST) $(COVERAGE) tests/unit tests/contract tests/template

# What is slow by nature.
soak: install $(LINT)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m soak -n 2 --dist load --durations=25

# The README's `sam local invoke`, for every event and through a whole run, in containers. What needs the network comes first: the
# engine of `engine.py` has none. Where no engine can be had, it says so and fails with its exit code 3.
containers: ENGINE = .venv/bin/python tests/containers/engine.py
containers: install
	@$(ENGINE) true
	PIP='"$(CURDIR)/.venv/bin/python" -m pip' SAM_CLI_TELEMETRY=0 .venv/bin/sam build
	.venv/bin/python -c "from local_app.build import build; build(print)"
	.venv/bin/python -m local_app.base_model .tunedrop/models
	OMP_NUM_THREADS=1 $(ENGINE) .venv/bin/python -m pytest tests/containers -m containers --durations=10

# To AWS: the stack as samconfig.toml's `default` names it, then the launch plan that its functions start jobs with.
deploy: $(DEPLOY) $(SAM)
	PIP='"$(CURDIR)/.venv-deploy/bin/python" -m pip' .venv-sam/bin/sam build
	.venv-sam/bin/sam deploy
	.venv-deploy/bin/python -m release --stack tunedrop
	-.venv-deploy/bin/tunedrop doctor --stack tunedrop

# Writes the locks after a change of what they are made of, on any machine: they hold for every Python and platform. Versions
# that are locked stay as long as they fit; for newer ones, delete the lock first.
UV := .venv-uv/bin/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
  --no-annotate --custom-compile-command "make locks"
locks:
	@test -x .venv-uv/bin/pip || $(PYTHON) -m venv .venv-uv
	@.venv-uv/$(PIP_INSTALL) uv==0.13.9
	$(UV) requirements/app.in -o requirements/app.lock --no-emit-package torch
	$(UV) requirements/sam.in -o requirements/sam.lock
	$(UV) requirements/lint.in -o requirements/lint.lock
	$(UV) requirements/deploy.in -o requirements/deploy.lock -c requirements/app.lock
	$(UV) requirements/light.in -o requirements/light.lock -c requirements/app.lock
	$(UV) layers/dependencies.in -o layers/dependencies.lock -c requirements/app.lock
	$(UV) layers/validation.in -o layers/validation.lock -c requirements/app.lock --no-deps

clean:
	-.venv/bin/tunedrop down
	rm -rf .venv .venv-* .aws-sam .containers .tunedrop build *.egg-info
