"""checkov and cfn-lint with its serverless rules have nothing to say that is not answered in writing, in the template."""

import re
import subprocess
from pathlib import Path

from template import TEMPLATE, load_template

LINT = TEMPLATE.parent / ".venv-lint" / "bin"


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=TEMPLATE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_cfn_lint_serverless() -> None:
    """The transformed template is linted in test_template.py."""
    run(LINT / "cfn-lint", "--append-rules", "cfn_lint_serverless.rules", "--regions", "us-east-1", "--template", TEMPLATE)


def test_cfn_lint_of_the_rules_to_copy() -> None:
    rules = sorted((TEMPLATE.parent / "events/rules").glob("*.yaml"))
    assert rules
    run(LINT / "cfn-lint", "--regions", "us-east-1", "--template", *rules)


def test_checkov() -> None:
    said = run(LINT / "checkov", "--config-file", ".checkov.yaml", "-f", "template.yaml")
    (passed,) = re.findall(r"Passed checks: (\d+), Failed checks: 0", said)
    assert int(passed) > 50  # it has read the template


def test_every_suppression_has_a_reason() -> None:
    template, lines = load_template(), TEMPLATE.read_text().splitlines()
    skips = [
        skip for r in template["Resources"].values() for skip in r.get("Metadata", {}).get("checkov", {}).get("skip", [])
    ]
    assert skips
    assert all(len(skip["comment"]) > 15 for skip in skips)
    ignored = [number for number, line in enumerate(lines) if "ignore_checks" in line]
    assert ignored
    assert all("#" in lines[number] or "#" in lines[number - 1] for number in ignored)
    config = (TEMPLATE.parent / ".checkov.yaml").read_text().splitlines()
    skipped = [number for number, line in enumerate(config) if "- CKV" in line]
    assert skipped
    assert all(config[number - 1].lstrip().startswith("#") for number in skipped)
