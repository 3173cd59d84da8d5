"""The one place for the Powertools objects. Nothing that is logged may contain dataset text."""

from aws_lambda_powertools import Logger, Metrics, Tracer

logger = Logger()
metrics = Metrics()
tracer = Tracer()
