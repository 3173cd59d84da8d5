"""Every resource type of the stack exists in every region: CloudFormation has fewer types in some."""

import json
import subprocess
from pathlib import Path

import pytest
from template import Json

from local_app.stack import PROJECT

LINT = PROJECT / ".venv-lint" / "bin"
# cfn-lint carries the registry of resource types of each region.
TYPES_OF_REGIONS = """
import json
from cfnlint.helpers import REGIONS
from cfnlint.schema import PROVIDER_SCHEMA_MANAGER
print(json.dumps({region: sorted(PROVIDER_SCHEMA_MANAGER.get_resource_types(region)) for region in REGIONS}))
"""


def regions(transformed: Json) -> list[str]:
    return sorted(transformed["Mappings"]["TrainingImage"])


def test_every_region_has_every_resource_type(transformed: Json) -> None:
    done = subprocess.run([LINT / "python", "-c", TYPES_OF_REGIONS], capture_output=True, text=True, check=True)
    known = json.loads(done.stdout)
    used = {resource["Type"] for resource in transformed["Resources"].values()}
    missing = {region: sorted(used - set(known[region])) for region in regions(transformed) if region in known}
    assert {region: types for region, types in missing.items() if types} == {}
    assert set(regions(transformed)) - known.keys() == {"me-west-1"}  # newer than the linter


@pytest.mark.soak
def test_cfn_lint_finds_nothing_to_say_in_any_region(transformed: Json, tmp_path: Path) -> None:
    file = tmp_path / "transformed.json"
    file.write_text(json.dumps(transformed))
    there = [region for region in regions(transformed) if region != "me-west-1"]
    command: list[str | Path] = [LINT / "cfn-lint", "--regions", *there, "--template", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
