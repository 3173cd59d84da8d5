"""The general questions of `probe.json`, as a part of a test job: what a tuning costs elsewhere.

The questions have no system prompt of the run, and the answers are greedy.
"""

from pathlib import Path

from trainer.engines import Decoding
from trainer.permissions import job_permissions
from trainer.scoring import Part
from tunedrop.config.model import RunConfig
from tunedrop.inference_tests import parse_tests
from tunedrop.rewards import RewardSpec, build_rewards

PROBE = Path(__file__).with_name("probe.json")
PROBE_TOKENS = 48


def probe_part(config: RunConfig, decoding: Decoding) -> Part:
    """Return the questions as a part of a test job. An answer is right if it contains the expected one, or passes checks."""
    trained = int(config.grpo["max_completion_length"])
    return Part(
        "probe",
        parse_tests(PROBE.read_bytes(), RunConfig(model=config.model)),
        decoding._replace(limit=PROBE_TOKENS),
        build_rewards([RewardSpec(type="contains")]),
        job_permissions(),
        config.grpo.get("chat_template_kwargs") or {},
        least=min(PROBE_TOKENS, trained),
    )
