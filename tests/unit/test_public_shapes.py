"""Rows in the shapes of public datasets, under their columns' real names: each is read rightly, or asks for a decision.

Every line of public_shapes.jsonl has a row of our own, and the prompt, answer and default reward that are right for it, or
the code of the problem that asks. Most names were compared with lm-evaluation-harness's tasks (`dataset_path`,
`doc_to_text`), the dataset lists of LLaMA-Factory and ms-swift, verl's preprocessing, or the datasets' cards.
"""

import json
from pathlib import Path

import pytest

from tunedrop.config.parse import parse_run_config
from tunedrop.dataset.rows import read_rows
from tunedrop.problems import Problem
from tunedrop.rewards import RewardPermissions, build_rewards
from tunedrop.rewards.default import choose_rewards
from tunedrop_cli.check import check_file

CASES = [json.loads(line) for line in Path(__file__).with_name("public_shapes.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=[case["dataset"] for case in CASES])
def test_a_public_shape_is_read_rightly_or_asks(tmp_path, case):
    data = tmp_path / "t.jsonl"
    data.write_text(2 * (json.dumps(case["row"]) + "\n"))  # one row alone could be a wrapper of others
    first, _ = read_rows(data, parse_run_config({"model": "m"}))
    if isinstance(first, Problem):
        assert first.code == case.get("refused"), first.message
        return
    read = {"prompt": "\n---\n".join(message["content"] for message in first["prompt"]), "answer": first["answer"]}
    assert read == {part: case[part] for part in read}
    permissions = RewardPermissions(allow_code=True)
    (spec,) = choose_rewards([first], permissions).rewards
    assert spec.type == case["reward"]
    (reward,) = build_rewards([spec], permissions)
    row = {name: [value] for name, value in first.items()}
    assert reward(row.pop("prompt"), [first["answer"]], **row) == [1.0]


def checked(folder, rows):
    data = folder / "t.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return check_file(data, None, None, None)


def test_a_text_that_asks_for_nothing_is_named(tmp_path):
    rows = [{"document": f"Town {n} built a mill.", "summary": f"A mill in town {n}."} for n in range(20)]
    assert any("'document' alone" in warning for warning in checked(tmp_path, rows).warnings)
    asked = [row | {"document": row["document"] + " In short:"} for row in rows]
    assert not any("alone" in warning for warning in checked(tmp_path, asked).warnings)


def test_json_for_which_no_prompt_asks_is_named(tmp_path):
    rows = [{"prompt": f"Write {n} lines.", "ground_truth": json.dumps({"lines": n})} for n in range(20)]
    assert any("no prompt asks for JSON" in warning for warning in checked(tmp_path, rows).warnings)
    asked = [row | {"prompt": row["prompt"] + " Answer in JSON."} for row in rows]
    assert not any("asks for JSON" in warning for warning in checked(tmp_path, asked).warnings)


def test_a_column_of_classes_marks_no_answer_as_wrong(tmp_path):
    def rows(classes):
        return [{"question": f"What is {n}?", "answer": f"a{n}", "label": n % classes} for n in range(20)]

    assert checked(tmp_path, rows(3)).ok
    assert not checked(tmp_path, rows(2)).ok
