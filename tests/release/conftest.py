"""The SageMaker SDK with the same requests in less time."""

import pytest
from jsonschema.validators import validator_for  # type: ignore[import-untyped]
from sagemaker.core.config import config_manager


@pytest.fixture(scope="session", autouse=True)
def checked_schema():
    """Check the schema of the SDK's configuration once, not at every look into the configuration."""
    schema = config_manager.SAGEMAKER_PYTHON_SDK_CONFIG_SCHEMA
    kind = validator_for(schema)
    kind.check_schema(schema)
    validator = kind(schema)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_manager.SageMakerConfig, "validate_sagemaker_config", staticmethod(validator.validate))
        yield
