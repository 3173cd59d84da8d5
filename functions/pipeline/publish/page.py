"""Renders self-contained HTML pages, which load no other file.

Templates escape all text of models and datasets. The content security policy allows only the page's own script, by its hash.
Only publish_results renders pages. The other functions have the same packages, so jinja2 is imported where it is used.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from pipeline.publish import words
from pipeline.publish.comparison import percent

FOLDER = Path(__file__).parent
SCRIPTS = {"report": ("differences.js", "report.js", "charts.js", "rollouts.js"), "index": ("index.js",)}


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "cut": _cut,
        "duration": words.duration,
        "figure": words.figure,
        "json": _json,
        "percent": percent,
        "share": words.share,
        "tojson_attribute": lambda value: msgspec.json.encode(value).decode(),
        "usd": words.usd,
    }
    return environment


def render_page(page: str, **values: Any) -> str:
    """Return the page of the template `<page>.html.j2` with its script and style; `values` are the template's variables."""
    from markupsafe import Markup

    script = "\n".join((FOLDER / name).read_text() for name in SCRIPTS[page])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rendered: str = (
        _environment()
        .get_template(f"{page}.html.j2")
        .render(
            css=Markup((FOLDER / "page.css").read_text()),  # noqa: S704 - our own file
            script=Markup(script),  # noqa: S704 - our own file
            script_hash=f"sha256-{digest}",
            **values,
        )
    )
    return rendered


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + " … (truncated; inference.json has the full text)"


def _json(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=str)).decode()
