"""The template as `sam build` and SAM's transform make it, once for all files."""

import os

import pytest
import yaml
from samtranslator.parser.parser import Parser
from samtranslator.translator.translator import Translator
from template import Json, of_type

from local_app.build import Build, build


@pytest.fixture(scope="session")
def built() -> Build:
    return build()


@pytest.fixture(scope="session")
def transformed(built: Build) -> Json:
    """The template as CloudFormation gets it: SAM's own transform applied, intrinsic functions left in place."""
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    template = yaml.safe_load(built.template.read_text())
    for function in of_type(template, "AWS::Serverless::Function").values():
        function["CodeUri"] = "s3://bucket/functions.zip"  # as `sam package` writes it
    for layer in of_type(template, "AWS::Serverless::LayerVersion").values():
        layer["ContentUri"] = "s3://bucket/layer.zip"
    translated: Json = Translator({}, Parser()).translate(template, {})
    return translated
