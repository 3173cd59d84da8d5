"""How a deployment's step says that it is not done."""


class NotYetError(Exception):
    """A resource is not ready. The deployment looks again."""


class DeploymentFailedError(Exception):
    """A model cannot be served, for a reason that waiting does not change."""
