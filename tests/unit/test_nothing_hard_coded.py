"""No region, partition or account of AWS is written into what runs there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = [
    *(ROOT / "functions").rglob("*.py"),
    *(ROOT / "trainer").rglob("*.py"),
    *(ROOT / "release").rglob("*.py"),
    *(ROOT / "tunedrop_cli").rglob("*.py"),
    ROOT / "template.yaml",
    *(ROOT / "events/rules").glob("*.yaml"),
]
# A partition in an ARN, a region, a registry of images, an account. (Service principals are the same in every partition.)
HARD_CODED = re.compile(
    r"arn:aws[:-]|\b(us|eu|ap|ca|sa|af|me|il|mx|cn)-[a-z]+-\d\b|\.dkr\.ecr\.(?!<region>|\$\{AWS::Region\}\.\$\{AWS::URLSuffix\})|\b\d{12}\b"
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_hard_coded(path):
    text = path.read_text()
    if path.name == "template.yaml":  # whose regions and accounts are the SDK's: tests/release/test_regions.py
        begin, end = text.index("Mappings:\n"), text.index("\nRules:\n")
        rule = text.index("  TrainingImageIsInTheRegion:")
        text = text[:begin] + text[end:rule] + text[text.index("AssertDescription", rule) :]
    lines = [line.strip() for line in text.splitlines() if not line.lstrip().startswith("Example:")]
    found = [line for line in lines if HARD_CODED.search(line.partition("  #")[0])]
    assert found == []
