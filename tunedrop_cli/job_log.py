"""The log of a job as `tunedrop logs` prints it: from the first line of the job itself."""

import re
from collections.abc import Iterator

# The first line of ModelTrainer's start-up script (sagemaker.train.templates), and the line by which its last command, the
# launch plan's, becomes the job. The lines between are the container's: its environment, and pip's output.
# bash writes a "+" for each level of its evals before a command (`set -x`).
SCRIPT, ENTRY = "Starting training script", re.compile(r"\++ exec python -m trainer\.job ")


class JobLog:
    """Withholds the lines of a container's start, and forgets them when the job itself begins."""

    def __init__(self) -> None:
        self._withheld: dict[str, list[str]] = {}  # by stream, while its container starts

    def own_lines(self, stream: str, line: str) -> Iterator[str]:
        """Yield the next line of a stream, unless the container's start wrote it."""
        if line == SCRIPT:
            self._withheld[stream] = [line]
        elif stream not in self._withheld:
            yield line
        elif ENTRY.match(line):
            del self._withheld[stream]
        else:
            self._withheld[stream].append(line)

    def unfinished_start(self) -> Iterator[str]:
        """Yield the lines of containers whose job did not begin, such as pip's error."""
        for lines in self._withheld.values():
            yield from lines
