"""A mistake of Tunedrop's own, which a user's file brings to light, is a line of the receipt, too."""

import logging
import traceback
from pathlib import Path

from tunedrop.problems import Problem

INTERNAL = "INTERNAL"
_FUNCTIONS = Path(__file__).parents[2]


def internal(error: Exception) -> Problem:
    """Return the problem for an exception that no code expects, and log the exception with its stack trace.

    The message names the type and the place, and no text of the user's file.
    """
    logging.getLogger(__name__).error("a user's file made Tunedrop fail", exc_info=error)
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(_FUNCTIONS)
    ]
    place = (
        f"{Path(frames[-1].filename).relative_to(_FUNCTIONS)}, line {frames[-1].lineno}" if frames else "an unknown place"
    )
    message = f"Tunedrop itself failed on these files: {type(error).__name__} in {place}"
    return Problem(INTERNAL, message, "this is a mistake in Tunedrop: report the message, with the files if you can")
