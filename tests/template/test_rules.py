"""No rule of ours is near what EventBridge calls too complex."""

from pathlib import Path

import pytest
from template import Json, load_template, of_type

from local_app.aws.event_patterns import complexity
from local_app.stack import PROJECT

MOST = 8  # EventBridge was seen to take 9 and to refuse 12


def test_the_templates_rules(transformed: Json) -> None:
    patterns = [
        rule["EventPattern"] for rule in of_type(transformed, "AWS::Events::Rule").values() if "EventPattern" in rule
    ]
    assert len(patterns) == 9
    assert max(map(complexity, patterns)) <= MOST


@pytest.mark.parametrize("path", sorted((PROJECT / "events/rules").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_rules_to_copy(path: Path) -> None:
    patterns = [rule["EventPattern"] for rule in of_type(load_template(path), "AWS::Events::Rule").values()]
    assert patterns
    assert max(map(complexity, patterns)) <= MOST


def test_a_rule_with_a_wildcard_for_each_format_would_be_refused() -> None:
    suffixes = ".jsonl .json .csv .jsonl.gz .json.gz .csv.gz .parquet".split()
    assert complexity({"detail": {"object": {"key": [{"wildcard": f"training_data/*{each}"} for each in suffixes]}}}) == 15
