# Everything installs itself: `make demo` and `make test` are all that a fresh machine needs (Python 3.11, make, git).
PYTHON ?= python3.11
# pip says nothing while it works; these files say when it has.
APP := .venv/.installed
SAM := .venv-sam/.installed
LINT := .venv-lint/.installed

.PHONY: install demo test lint browser deploy soak clean

install: $(APP) $(SAM)

$(APP): requirements/app.txt requirements/app.lock functions/requirements.txt trainer/requirements.txt pyproject.toml
	@echo "installing the application into .venv"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -qq --disable-pip-version-check pip==26.3
	@.venv/bin/python -m pip install -qq --disable-pip-version-check -r requirements/app.txt -c requirements/app.lock
	@.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --editable .
	@touch $@

$(SAM): requirements/sam.txt requirements/sam.lock
	@echo "installing the SAM CLI into .venv-sam"
	@test -x .venv-sam/bin/python || $(PYTHON) -m venv .venv-sam
	@.venv-sam/bin/python -m pip install -qq --disable-pip-version-check pip==26.3
	@.venv-sam/bin/python -m pip install -qq --disable-pip-version-check -r requirements/sam.txt -c requirements/sam.lock
	@touch $@

$(LINT): requirements/lint.txt requirements/lint.lock
	@echo "installing the template's linters into .venv-lint"
	@test -x .venv-lint/bin/python || $(PYTHON) -m venv .venv-lint
	@.venv-lint/bin/python -m pip install -qq --disable-pip-version-check pip==26.3
	@.venv-lint/bin/python -m pip install -qq --disable-pip-version-check -r requirements/lint.txt -c requirements/lint.lock
	@touch $@

# The tests open the report in a browser.
browser:
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || ! command -v apt-get > /dev/null \
	  || (echo "installing Chromium" && apt-get update -qq && apt-get install -qq -y chromium > /dev/null)

# From a sample dataset to a published model, on this machine.
demo: install
	@.venv/bin/tunedrop demo

lint: install
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy functions trainer local_app

# Two files of tests at a time; torch's threads would only fight over two cores.
test: lint browser $(LINT)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile

# What is slow by nature.
soak: install browser $(LINT)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m soak -n 2 --dist load --durations=25

# To AWS: the stack as samconfig.toml's `default` names it, then the launch plan that its functions start jobs with.
deploy: install
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv-sam/bin/sam build
	.venv-sam/bin/sam deploy
	.venv/bin/python -m trainer.release --stack tunedrop

clean:
	-.venv/bin/tunedrop down
	rm -rf .venv .venv-sam .venv-lint .aws-sam .tunedrop build *.egg-info
