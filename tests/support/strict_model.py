"""Every request that the tests make by boto3 is held against its service's model, which says more than botocore checks."""

from collections import Counter
from typing import Any

from botocore.model import OperationModel
from botocore.validate import ParamValidationDecorator

from local_app.sagemaker.constraints import violations

calls: Counter[str] = Counter()  # how many requests of each operation were checked
broken: list[str] = []  # what was wrong with those of the running test


def install() -> None:
    """Check each request where botocore is about to serialize it: the last place before the wire, for every service."""
    serialize = ParamValidationDecorator.serialize_to_request

    def serialize_to_request(self: ParamValidationDecorator, parameters: Any, operation: OperationModel) -> Any:
        request = serialize(self, parameters, operation)
        calls[f"{operation.service_model.service_name}.{operation.name}"] += 1
        if operation.input_shape is not None:
            broken.extend(f"{operation.name}: {each}" for each in violations(operation.input_shape, parameters))
        return request

    ParamValidationDecorator.serialize_to_request = serialize_to_request
