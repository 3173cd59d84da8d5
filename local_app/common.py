"""Names that the stack, both emulators and the command share."""

from pathlib import Path
from typing import Any

Json = dict[str, Any]
PROJECT = Path(__file__).resolve().parent.parent
STACK_NAME = "tunedrop"
# The emulated AWS account.
ACCOUNT = "000000000000"
REGION = "us-east-1"
# An environment variable of every process that the local app starts; its value is the app's folder. `Stack.processes` finds
# the processes by this variable.
MARKER = "TUNEDROP_FOLDER"
# What the name of Bedrock's session with an import job's role begins with; the job's id follows.
IMPORT_SESSION = "model-import-job-"


class StackError(Exception):
    """An error that a person can fix. The message says what is wrong, where, and what to do."""
