"""`report.html`: one self-contained page about a run. All text of models and datasets is escaped."""

from pathlib import Path
from typing import Any

import msgspec


def render_report(
    result: dict[str, Any], *, receipt: dict[str, Any], metrics: list[dict[str, Any]], tests: list[dict[str, Any]]
) -> str:
    """Return the page for a run's result, its dataset's receipt, its metrics by step and its inference tests."""
    # Only publish_results renders: the other functions that share this artefact do not pay for these imports.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        result=result,
        receipt=receipt,
        tests=sorted(tests, key=lambda test: test["tuned"]["score"] - test["base"]["score"], reverse=True),
        config=msgspec.json.format(msgspec.json.encode(result["config"])).decode(),
        chart=Markup(_reward_chart(metrics)),  # noqa: S704 - pygal escapes what it draws, and reward names are plain
    )


def _reward_chart(metrics: list[dict[str, Any]]) -> str:
    """Draw the mean reward by step, in all and for each reward, as an SVG element."""
    from pygal import XY
    from pygal.style import CleanStyle

    names = sorted({name for point in metrics for name in point["rewards"]})
    chart = XY(
        style=CleanStyle(font_family="inherit"),
        x_title="step",
        y_title="mean reward",
        width=900,
        height=380,
        show_legend=len(names) > 1,
        dots_size=2,
        show_x_guides=False,
        legend_at_bottom=True,
        legend_at_bottom_columns=3,
        js=[],
        disable_xml_declaration=True,
    )
    chart.uuid = "reward"  # a random one would make each rendering other bytes
    chart.add("reward", [(point["step"], point["reward"]) for point in metrics])
    for name in names if len(names) > 1 else []:
        chart.add(name, [(point["step"], point["rewards"].get(name)) for point in metrics], stroke_style={"width": 1})
    svg: str = chart.render(is_unicode=True)
    return svg
