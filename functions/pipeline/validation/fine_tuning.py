"""Whether the rows have what supervised fine-tuning needs: a run with `method: sft`, and a warm start (`warm_start`)."""

from collections.abc import Sequence

from pipeline.validation.section import Section
from tunedrop.config.model import RunConfig
from tunedrop.dataset.rows import Row
from tunedrop.problems import Problem
from tunedrop.rewards import Reward, RewardError
from tunedrop.targets import NO_REASONING, Targets, targets

MOST_ROWS = 64  # of the sample


def check_fine_tuning(config: RunConfig, rewards: Sequence[Reward], sample: Sequence[Row]) -> Section:
    """Return the section with the targets of a sample's rows, and with what the run will do with them.

    A run that must learn from targets is rejected if no row has one. Rewards that fail are the preflight's findings.
    """
    rows = sample[:MOST_ROWS]
    reasoned_only = config.method == "grpo" and config.warm_start.policy == "auto"
    try:
        found = targets(config, rewards, rows, reasoned_only=reasoned_only)
    except RewardError:
        return Section({}, [], [])
    problems = []
    demanded = "method is sft" if config.method == "sft" else "warm_start.policy is always"
    if not found.usable and (config.method == "sft" or config.warm_start.policy == "always"):
        problems.append(_problem(config, found, demanded))
    return Section({"warm_start": found.summary() | {"plan": _plan(config, found)}}, problems, [])


def _problem(config: RunConfig, found: Targets, demanded: str) -> Problem:
    key = "method" if config.method == "sft" else "warm_start.policy"
    if found.left_out.keys() <= {NO_REASONING}:
        message = (
            f"{demanded}, and the run asks for an answer with reasoning, but no row has reasoning: bare answers would teach "
            "the model to skip it"
        )
        hint = "add a column 'reasoning' with each row's worked solution, or let the answers be whole solutions (… #### 42)"
        return Problem("NO_REASONING", message, hint, key=key)
    counts = ", ".join(f"{reason}: {rows}" for reason, rows in sorted(found.left_out.items()))
    message = f"{demanded}, but no row's own solution earns full marks from the run's rewards; rows by reward: {counts}"
    hint = "compare receipt.rewards with the dataset's answers, and change the reward or the answers"
    return Problem("NO_TARGETS", message, hint, key=key)


def _plan(config: RunConfig, found: Targets) -> str:
    """Return in words whether the run begins with supervised fine-tuning."""
    policy = config.warm_start
    usable = f"{found.usable} of {len(found.texts)} sampled rows"
    if config.method == "sft":
        return f"the run is supervised fine-tuning alone, on {usable}"
    if policy.policy == "never":
        return "no warm start: warm_start.policy is never"
    if policy.policy == "always":
        return f"the run begins with supervised fine-tuning, on {usable}"
    if not found.usable:
        return "no warm start: no row has reasoning that earns full marks from the run's rewards"
    if config.learnability.samples == 0:
        return "no warm start: learnability.samples is 0, and without it nothing shows that the base model is lost"
    return (
        f"the run begins with supervised fine-tuning, on {usable}, if the base model never solves more than "
        f"{policy.dead_above:.0%} of the prompts"
    )
