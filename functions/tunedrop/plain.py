"""Users' text for other media: terminals, e-mails, chat cards, and the alphabets of AWS's services."""

import unicodedata


def printable(text: str) -> str:
    r"""Return a text without control and format characters, except for `\n` and `\t`.

    Left out are Unicode's categories C*: escape sequences would control a terminal, marks of direction would change the
    order in which a reader sees the text, and services refuse all of them.
    """
    if text.isprintable():
        return text
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char)[0] != "C")


def one_line(text: str) -> str:
    """Return a text as one printable line: a line break in a dataset's name must not forge a line of an e-mail."""
    return " ".join(printable(text).split())


def without_markup(text: str) -> str:
    """Return one line that Slack and Teams show as it is: no mentions (`<!channel>`) and no links under other words."""
    return one_line(text).replace("<", "\u2039").replace(">", "\u203a").replace("](", "] (")
