"""The sentences and numbers of a report."""

import re

import pytest
from made_up import COST, LENGTHS, PROOFS, TRAINING

from pipeline.publish import words
from pipeline.publish.charts import TICKS, Curve, Mark, chart, ticks

METRICS = [{"step": n, "reward": n / 10, "frac_reward_zero_std": 0.08} for n in range(1, 11)]
RECEIPT = {
    "rows": 1000,
    "heldout": 100,
    "warnings": ["w"],
    "cost": COST,
    "rejected": {"rows": 2},
    "tokens": {"prompt": LENGTHS},
}
TOOK = {"seconds": 3000, "instance_type": "ml.g5.4xlarge"}


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (words.share, 0.614, "61 %"),
        (words.share, 0.0, "0 %"),
        (words.share, 0.001, "under 1 %"),
        (words.share, 0.999, "over 99 %"),
        (words.share, 1.0, "100 %"),
        (words.figure, 20.93257713317871, "20.93"),
        (words.figure, 0.0071, "0.0071"),
        (words.figure, 25.0, "25"),
        (words.figure, 134530276.0, "134,530,276"),
        (words.figure, None, "unknown"),
        (words.duration, 59.5, "60 s"),
        (words.duration, 536.5, "9 min"),
        (words.duration, 7300, "2 h 2 min"),
        (words.duration, 7200, "2 h"),
        (words.duration, None, "unknown"),
        (words.usd, 1234.5, "$1,234.50"),
        (words.usd, None, "unknown"),
    ],
)
def test_numbers_have_units_and_few_digits(function, value, expected):
    assert function(value) == expected


def test_counts_have_their_plural():
    assert [words.count(number, "test") for number in (0, 1, 1200)] == ["0 tests", "1 test", "1,200 tests"]


def test_each_section_says_what_it_is_about():
    gate = TRAINING["learnability"]
    assert words.about_learnability(gate, METRICS) == (
        "58 % of the 64 prompts that the model was asked before the training were learnable: its 8 answers got different "
        "rewards. The training could use 61 % of its groups, and used 92 %."
    )
    training = TRAINING | {"steps": 300, "max_steps": 300}
    assert words.about_training(training, METRICS, 0) == (
        "The mean reward rose from 0.1 to 1, and the training ended after all planned steps (300 of 300 steps). The saved "
        "model is that of step 270: 0.675 on held-out rows. No alert was raised."
    )
    assert "because of the alert DEAD_REWARD" in words.about_training(training | {"ended": "DEAD_REWARD"}, METRICS, 2)
    assert "did not rise: it was 1, then 0.1" in words.about_training(training, METRICS[::-1], 1)
    assert words.about_sampling(TRAINING["sampling"]).endswith(
        "50 % of 120 sampled groups taught, and 7 of them replaced a group that taught nothing."
    )
    assert "100 % of that change" in words.about_proofs(PROOFS)
    assert dict(words.proof_rows(PROOFS))["change of a token's log-probability by the tuning"] == (
        "0.4 nats on average, 20.93 at most"
    )
    assert words.about_data(RECEIPT, TRAINING) == (
        "The dataset has 1,000 rows. 100 were held out to judge the training, and the model trained on 900 of them. 2 were "
        "broken, 12 were left out of the training. Validation gave 1 warning."
    )
    assert dict(words.data_rows(RECEIPT))["length of a prompt in tokens"] == (
        "half have at most 25, 95 % at most 80; the longest has 120"
    )


@pytest.mark.parametrize(
    ("usd", "expected"),
    [
        (
            3.5,
            "Training and tests took 100 min and cost $3.50. The estimate before the start was 30 min to 2 h, for $1.00",
        ),
        (
            None,
            "Training and tests took 100 min. What they cost is not known: the launch plan has no price of ml.g5.4xlarge.",
        ),
    ],
)
def test_the_cost_stands_beside_its_estimate(usd, expected):
    result = {"cost": {"usd": usd, "jobs": {"train": TOOK, "test": TOOK}}}
    assert words.about_cost(result, RECEIPT).startswith(expected)
    assert "estimate" not in words.about_cost(result, RECEIPT | {"cost": None})


@pytest.mark.parametrize(
    ("verdict", "low", "decided", "holds"),
    [
        ("APPROVED", 0.1, "approved the model", "+0.100, is."),
        ("REJECTED", -0.1, "rejected the model", "-0.100, is not."),
        ("PENDING", 0.1, "left the decision to a person", ("+0.100, is, but another condition does not hold (see "
         "the top of the page).")),
    ],
)  # fmt: skip
def test_the_gate_says_what_it_asked_for(verdict, low, decided, holds):
    result = {"config": {"gate": {"min_lift": 0.0}}, "comparison": {"lift_low": low}, "verdict": verdict}
    asked = "it asks for a lift of more than 0, which the lowest likely lift,"
    assert words.about_gate(result) == f"The gate {decided}: {asked} {holds}"


# --- charts ---


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 7.3, 1e6])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.3, 0.4), (0.2, 0.2), (0.0, 0.0), (-5.0, -5.0), (0.97, 1.0)])
def test_ticks_are_few_round_numbers_around_the_values(low, high, scale):
    found = ticks(low * scale, high * scale)
    assert found[0] <= low * scale + 1e-12
    assert found[-1] >= high * scale - 1e-12
    assert 2 <= len(found) <= 2 * TICKS
    assert len({f"{value:.6g}" for value in found}) == len(found)


@pytest.mark.parametrize("points", [[], [(5, 0.5)], [(1, 0.0), (2, 0.0)], [(n, n * 1.5) for n in range(100)]])
def test_a_chart_stays_within_its_drawing_and_says_its_values(points):
    drawn = chart(
        "Reward", [Curve("training", points), Curve("held-out", points[-1:], dots=True)], [Mark(3, "alert", "alert X")]
    )
    for x, y in re.findall(r"([-0-9.]+),([-0-9.]+)", " ".join(line["path"] for line in drawn["lines"])):
        assert 0 <= float(x) <= 420
        assert 0 <= float(y) <= 230
    assert [text.partition(" · ")[0] for _, text in drawn["hover"]] == [
        f"step {step}" for step in sorted({step for step, _ in points} | {3})
    ]
    assert any("alert X" in text for _, text in drawn["hover"])
    if len(points) > 2:
        assert drawn["summary"][0].startswith("training from 0 at step 0 to 148 at step 99")
