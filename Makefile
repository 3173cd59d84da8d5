# `make demo` and `make test` install what they need on a machine with Python 3.11 to 3.13, make and git.
# PYTHON is the newest installed version; `make PYTHON=...` selects another one.
PYTHON ?= $(or $(call runs,python3.13 python3.12 python3.11),$(error python3.13, python3.12 and python3.11 not found: \
  install one of them, or select a Python with `make PYTHON=...`))
# Returns the first command that runs. A version manager has a file for each version it knows, installed or not.
runs = $(shell for python in $(1); do $$python -c "" 2> /dev/null && echo $$python && break; done)

# Each environment has a marker file, newer than its lock when its packages are up to date.
APP := .venv/.installed
SAM := .venv-sam/.installed
LINT := .venv-lint/.installed
DEPLOY := .venv-deploy/.installed
FUZZ := .venv-fuzz/.installed
SBOM := .venv-sbom/.installed
LIGHT = .venv-$(notdir $(PYTHON))
# Python compiles modules as it first imports them, and keeps them: a fifth of what pip would compile.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL = bin/python -m pip install -qq --disable-pip-version-check --no-compile
# Two environments at a time.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += --jobs=2
endif

.PHONY: install demo test test-python light lint browser deploy soak fuzz containers locks sbom clean

install: $(APP) $(SAM)
	@ln -sf ../../.venv-sam/bin/sam .venv/bin/sam

# Creates the environment $(1) with exactly the packages of the lock $(2).
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
	@# Jobs may not write into the environment: their imports are compiled here.
	@.venv/bin/python -c "import trainer.run_trainer, trainer.test_model"
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
	@echo "installing the tunedrop command and the SageMaker SDK into .venv-deploy"
	$(call environment,.venv-deploy,$<)
	@.venv-deploy/$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(FUZZ): requirements/fuzz.lock
	@echo "installing the fuzzer into .venv-fuzz"
	$(call environment,.venv-fuzz,$<)
	@touch $@

$(SBOM): requirements/sbom.lock
	@echo "installing cyclonedx-bom into .venv-sbom"
	$(call environment,.venv-sbom,$<)
	@touch $@

$(LIGHT)/.installed: requirements/light.lock pyproject.toml
	@echo "installing the packages for tests without torch into $(LIGHT)"
	$(call environment,$(LIGHT),$<)
	@$(LIGHT)/$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

# The tests in tests/report and one of the console open pages in a browser. On Debian and Ubuntu, `make test` installs one if it
# runs as root. Otherwise it skips these tests and prints how to install a browser.
BROWSER = $(shell command -v chromium || command -v google-chrome)
WITHOUT_BROWSER = $(if $(BROWSER),,--ignore=tests/report --deselect=$(CONSOLE))
CONSOLE = tests/integration/test_console.py::test_a_file_is_dragged_into_a_browser
NO_BROWSER = $(if $(BROWSER),,@echo "tests/report and the console's test skipped, because no browser was found. Install Chromium (on Debian \
  and Ubuntu: apt-get install chromium) or Google Chrome.")
browser:
	@test -n "$(BROWSER)" || test "$$(id -u)" != 0 || ! command -v apt-get > /dev/null \
	  || (echo "installing Chromium" && apt-get update -qq && apt-get install -qq -y chromium > /dev/null) || true

# Tunes, tests and publishes a model from the sample dataset, on this machine.
demo: install
	@.venv/bin/tunedrop demo

lint: install
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy -n 2 functions trainer release tunedrop_cli local_app tests benchmarks

# Test files at a time: 2, and 3 where tests wait for processes. OMP_NUM_THREADS=1 keeps torch's threads from competing for the cores.
PYTEST = -m pytest --dist loadfile -n

# Runs every test once. Tests without torch run with another Python, if one is installed. The trainer's tests come first, in processes
# of their own: the others need less memory without torch. These run in the order of their folders, because xdist's order, files with
# the most tests first, ends with the longest files.
WITHOUT_TORCH = tests/unit tests/contract tests/template
OTHER = $(call runs,$(filter-out $(notdir $(PYTHON)),python3.13 python3.12))
test: lint light browser $(LINT)
	$(NO_BROWSER)
	OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST) 2 tests/trainer
	OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST) 3 --no-loadscope-reorder --ignore=tests/trainer $(WITHOUT_BROWSER) \
	  $(if $(OTHER),$(addprefix --ignore=,$(WITHOUT_TORCH)))
	$(if $(OTHER),$(MAKE) test-python PYTHON=$(OTHER))
	$(NO_BROWSER)

light:
	@$(if $(OTHER),$(MAKE) PYTHON=$(OTHER) .venv-$(OTHER)/.installed)

# Python 3.12 and later measure coverage cheaply (sys.monitoring).
COVERAGE = --cov=functions --cov=release --cov=tunedrop_cli --cov-fail-under=61

# `make test-python PYTHON=python3.12` runs the tests without torch: the command, the functions, the template.
test-python: $(LIGHT)/.installed $(SAM) $(LINT)
	COVERAGE_CORE=sysmon $(LIGHT)/bin/python $(PYTEST) 2 $(COVERAGE) $(WITHOUT_TORCH)

# The long tests: random search, crashes at every point, large files. The searches fork for each case: without torch, their
# processes are a tenth as large.
SOAK = -m pytest -m soak -n 2 --dist worksteal --durations=25
soak: install browser $(LINT)
	OMP_NUM_THREADS=1 .venv/bin/python $(SOAK) tests/trainer
	OMP_NUM_THREADS=1 .venv/bin/python $(SOAK) --ignore=tests/trainer
	test "$$(uname)" != Linux || $(MAKE) fuzz

# Searches for files that a parser cannot bear, guided by coverage (atheris, on Linux): SECONDS for each of six parsers, two at a time.
SECONDS = 600
fuzz: $(FUZZ)
	PYTHONPATH=functions:tests/support .venv-fuzz/bin/python tests/hostile/fuzz.py $(SECONDS)

# Runs the README's `sam local invoke` commands in containers, with every event and for a whole run. Steps that need the network come
# first, because `engine.py` starts an engine without network. Exits with code 3 if no engine runs and none can be started.
containers: ENGINE = .venv/bin/python tests/containers/engine.py
containers: install
	@$(ENGINE) true
	PIP='"$(CURDIR)/.venv/bin/python" -m pip' SAM_CLI_TELEMETRY=0 .venv/bin/sam build
	.venv/bin/python -c "from local_app.build import build; build(print)"
	.venv/bin/python -m local_app.base_model .tunedrop/models
	OMP_NUM_THREADS=1 $(ENGINE) .venv/bin/python -m pytest tests/containers -m containers --durations=10

# Deploys the stack to AWS as samconfig.toml's `default` describes, then stores the launch plan from which functions start jobs.
deploy: $(DEPLOY) $(SAM)
	PIP='"$(CURDIR)/.venv-deploy/bin/python" -m pip' .venv-sam/bin/sam build
	.venv-sam/bin/sam deploy
	.venv-deploy/bin/python -m release --stack tunedrop
	-.venv-deploy/bin/tunedrop doctor --stack tunedrop

# Writes the locks. They are valid for every Python and platform, and any machine can write them. Locked versions are kept where they
# fit; to get newer versions, delete the lock first.
UV := .venv-uv/bin/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
  --no-annotate --custom-compile-command "make locks"
locks:
	@test -x .venv-uv/bin/pip || $(PYTHON) -m venv .venv-uv
	@.venv-uv/$(PIP_INSTALL) uv==0.13.9
	$(UV) requirements/app.in -o requirements/app.lock --no-emit-package torch
	$(UV) requirements/sam.in -o requirements/sam.lock
	$(UV) requirements/lint.in -o requirements/lint.lock
	$(UV) requirements/sbom.in -o requirements/sbom.lock
	$(UV) requirements/deploy.in -o requirements/deploy.lock -c requirements/app.lock
	$(UV) requirements/light.in -o requirements/light.lock -c requirements/app.lock
	$(UV) requirements/fuzz.in -o requirements/fuzz.lock -c requirements/light.lock
	$(UV) layers/dependencies.in -o layers/dependencies.lock -c requirements/app.lock
	$(UV) layers/validation.in -o layers/validation.lock -c requirements/app.lock --no-deps

# Writes CycloneDX bills of materials into build/sbom: of each lock that is deployed, with the packages' hashes, and of each
# environment of this machine, with the packages' licences.
sbom: $(APP) $(SAM) $(LINT) $(SBOM)
	@mkdir -p build/sbom
	@for lock in layers/*.lock trainer/requirements.lock; do .venv-sbom/bin/cyclonedx-py requirements --output-reproducible \
	  -o build/sbom/$$(basename $$(dirname $$lock))-$$(basename $$lock .lock).json $$lock || exit 1; done
	@for environment in .venv .venv-sam .venv-lint; do .venv-sbom/bin/cyclonedx-py environment --output-reproducible \
	  -o build/sbom/environment$${environment#.venv}.json $$environment || exit 1; done
	@ls build/sbom/*.json

clean:
	-.venv/bin/tunedrop down
	rm -rf .venv .venv-* .aws-sam .containers .tunedrop build *.egg-info
