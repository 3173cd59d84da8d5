# Everything installs itself: `make demo` and `make test` are all that a fresh machine needs (Python 3.11, make, git).
PYTHON ?= python3.11
# pip says nothing while it works; these files say when it has.
APP := .venv/.installed
SAM := .venv-sam/.installed

.PHONY: install demo test lint deploy soak clean

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

# From a sample dataset to a published model, on this machine.
demo: install
	@.venv/bin/tunedrop demo

lint: install
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy functions trainer local_app

test: lint
	.venv/bin/python -m pytest

# What is slow by nature.
soak: install
	.venv/bin/python -m pytest -m soak

# To AWS: the stack as samconfig.toml's `default` names it, then the launch plan that its functions start jobs with.
deploy: install
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv-sam/bin/sam build
	.venv-sam/bin/sam deploy
	.venv/bin/python -m trainer.release --stack tunedrop

clean:
	-.venv/bin/tunedrop down
	rm -rf .venv .venv-sam .aws-sam .tunedrop build *.egg-info
