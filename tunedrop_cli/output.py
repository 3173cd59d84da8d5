"""How the command prints: aligned columns, with colours in a terminal, and plain text without wrapping in a pipe."""

import sys
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from tunedrop.plain import printable

console = Console(highlight=False, soft_wrap=True)
_errors = Console(highlight=False, soft_wrap=True, stderr=True)
GAP = "  "
# Colours of cells, by their text.
STYLES = {
    **dict.fromkeys(("published", "APPROVED"), "green"),
    **dict.fromkeys(("rejected", "training failed", "testing failed", "REJECTED", "error"), "red"),
    **dict.fromkeys(("waiting", "cancelled", "PENDING", "note"), "yellow"),
    **dict.fromkeys(("training", "testing"), "cyan"),
}

Fact = tuple[str, str]  # a label and its value


def print_table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), styles: Sequence[str] = ()) -> None:
    """Print rows in aligned columns. `styles` has the style of each row."""
    lines = [[printable(cell) for cell in line] for line in ([header, *rows] if header else rows)]
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(lines[0]))] if lines else []
    for number, line in enumerate(lines):
        text = Text(style="dim" if header and number == 0 else styles[number - len(lines)] if styles else "")
        for cell, width in zip(line, widths, strict=True):
            text.append(cell, style=STYLES.get(cell, "")).append(" " * (width - cell_len(cell)) + GAP)
        text.rstrip()
        console.print(text)


def print_facts(facts: Iterable[Fact]) -> None:
    """Print one fact a line: its label, then its value. The further lines of a value are aligned with its first line."""
    lines = [
        (label if number == 0 else "", line)
        for label, value in facts
        for number, line in enumerate(value.splitlines() or [""])
    ]
    print_table(lines)


def say(line: str) -> None:
    """Print a step of a longer command."""
    console.print(printable(line), style="dim", markup=False)


def print_error(line: str) -> None:
    """Print an error where no document goes: to stderr."""
    _errors.print(f"error: {printable(line)}", style="red", markup=False)


def print_raw(text: object) -> None:
    """Print text for another program, as it is."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
