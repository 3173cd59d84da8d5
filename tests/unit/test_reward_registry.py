"""A new reward touches one file: the decorator above its function tells every other part of Tunedrop what it needs."""

import ast
from pathlib import Path

import pytest

from pipeline.validation.preflight import check_rewards
from tunedrop.config.parse import parse_run_config
from tunedrop.config.reference import config_defaults, config_schema
from tunedrop.config.rules import config_warnings
from tunedrop.problems import RejectedError
from tunedrop.rewards import REWARDS, RewardError, RewardPermissions, build_rewards, score
from tunedrop.rewards.registry import Form, Need, reward

PROJECT = Path(__file__).parents[2]
ROWS = [
    {"id": f"r{number}", "prompt": [{"role": "user", "content": f"Say {word}."}], "answer": word.upper()}
    for number, word in enumerate("river mountain garden forest".split())
]


@pytest.fixture(autouse=True)
def new_rewards(monkeypatch):
    """Register rewards of each kind of trait, as a module of the package would."""
    before = dict(REWARDS)

    @reward(measures="answer", form=lambda parameters: Form(tags=(parameters["tag"],)))
    def shouted(sample, *, tag: str = "shout", share: float = 1.0) -> float:
        """Rate the completion 1.0 when it shouts the row's answer in the element `tag`."""
        return share * (f"<{tag}>\n{sample.answer}\n</{tag}>" in sample.completion)

    @reward(measures="form")
    def polite(sample) -> float:
        """Rate the completion 1.0 when it says please."""
        return float("please" in sample.completion)

    @reward(
        measures="answer",
        waits=True,
        repeatable=False,
        file="script",
        needs=Need(lambda permissions, parameters: parameters["script"] in permissions.hosts, "Scripts", "runs a script"),
    )
    def scripted(samples, permissions, *, script: str) -> list[float]:
        """Rate completions with a script."""
        calls.append(script)
        return [float(sample.completion == sample.answer) for sample in samples]

    calls: list[str] = []
    yield calls
    for name in set(REWARDS) - set(before):
        del REWARDS[name]


def config(*rewards):
    return parse_run_config({"model": "m", "rewards": list(rewards)})


def test_the_config_takes_a_new_reward_and_refuses_its_mistakes():
    assert config({"type": "shouted", "tag": "a"}).rewards[0].parameters == {"tag": "a", "share": 1.0}
    with pytest.raises(RejectedError, match="did you mean 'share'"):
        config({"type": "shouted", "shares": 1})
    with pytest.raises(RejectedError, match="did you mean 'shouted'"):
        config({"type": "shoutet"})


def test_the_schema_and_the_reference_describe_a_new_reward():
    (schema,) = (each for each in config_schema()["properties"]["rewards"]["items"]["oneOf"] if each["title"] == "shouted")
    assert schema["description"].startswith("Rate the completion 1.0 when it shouts")
    assert schema["properties"]["tag"]["default"] == "shout"
    assert "#- {type: scripted, script: ...}" in config_defaults()


def test_the_preflight_puts_answers_into_its_form_and_expects_them_to_win():
    good, bad = ({"type": "shouted", "share": share} for share in (1.0, -1.0))
    section = check_rewards(build_rewards(config(good).rewards), ROWS, config(good), [], trained_rows=4)
    assert section.problems == []
    assert ["word for word" in warning for warning in section.warnings] == [True]  # the reward does not ignore spaces
    assert section.receipt["answers"][0] == {"kind": "gold", "mean": 1.0, "lowest": 1.0, "highest": 1.0}
    section = check_rewards(build_rewards(config(bad).rewards), ROWS, config(bad), [], trained_rows=4)
    assert {problem.code for problem in section.problems} == {"REWARD_PAYS_WRONG"}
    form = config({"type": "polite"})
    assert check_rewards(build_rewards(form.rewards), ROWS, form, [], trained_rows=4).problems == []


def test_a_reward_that_is_not_repeatable_is_called_once_per_row(new_rewards):
    asked = config({"type": "scripted", "script": "s.py"})
    section = check_rewards(
        build_rewards(asked.rewards, RewardPermissions(hosts=("s.py",))), ROWS, asked, [], trained_rows=4
    )
    assert section.problems == []
    assert len(new_rewards) == len(ROWS)


def test_a_new_reward_scores_beside_the_others():
    rewards = build_rewards(config({"type": "shouted", "weight": 2.0}, {"type": "contains"}).rewards)
    (scored,) = score(rewards, ["Say river."], ["<shout>\nRIVER\n</shout>"], {"answer": ["RIVER"]})
    assert scored == {"score": 3.0, "rewards": {"shouted": 1.0, "contains": 1.0}}


def test_its_permission_its_file_and_its_weight_as_form_are_known():
    (spec,) = config({"type": "scripted", "script": "s.py"}).rewards
    assert spec.reward_file == "s.py"
    with pytest.raises(RewardError, match=r"reward 'scripted' runs a script \(stack parameter Scripts\)"):
        build_rewards([spec])
    warning = "the rewards pay more for the format than for the answer"
    assert warning in config_warnings(config({"type": "shouted"}, {"type": "polite", "weight": 2}))


def test_only_the_rewards_themselves_compare_the_names_of_rewards():
    """Elsewhere a reward's traits decide; a comparison with a name would have to be changed for a new reward."""
    compared = []
    for folder in ("functions", "trainer", "release", "tunedrop_cli", "local_app"):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            if "rewards" in path.parent.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == "type":
                    names = {
                        each.value for part in node.comparators for each in ast.walk(part) if isinstance(each, ast.Constant)
                    }
                    compared += [f"{path}:{node.lineno}" for _ in names & set(REWARDS)]
    assert compared == []
