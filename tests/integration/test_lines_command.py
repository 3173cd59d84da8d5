"""The commands for lines, against run items, line items, results and model packages as the pipeline writes them."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import msgspec
import pytest
from fake_stack import ARTIFACTS, MODELS, TABLE
from moto.sagemaker.models import sagemaker_backends
from world import GOOD_DATA, WON, World

from pipeline.publish.index import IndexedRun, render_index
from pipeline.publish.registry import APPROVAL
from pipeline.runs.states import Run, RunState
from pipeline.runs.table import RUN
from tunedrop import object_keys
from tunedrop_cli.lines import sparkline

BASE = 0.25
Command = Callable[..., str]


class Made:
    """A stack with runs and lines that are made here, without jobs. A run's name is `<letters of its dataset>-<number>`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sagemaker = boto3.client("sagemaker")
        self.table = boto3.resource("dynamodb").Table(TABLE)
        self.index: list[IndexedRun] = []
        self.sagemaker.create_model_package_group(ModelPackageGroupName=MODELS)

    def run(self, dataset: str, number: int, state: RunState = RunState.TRAINING, **more: Any) -> str:
        run_id = f"{object_keys.slug(dataset)}-{number:012x}"
        moment = f"2026-11-{number:02}T10:00:00.000000+00:00"
        values = {"run_id": run_id, "dataset": dataset, "state": state, "attempt": 1, "trigger": "k@1", "version_id": "v"}
        values |= {
            "key": f"training_data/{dataset}.jsonl",
            "arrived": moment,
            "updated": moment,
            "model": "base",
            "plan": "p",
        }
        run = msgspec.convert(values | more, Run)
        item = {name: value for name, value in msgspec.to_builtins(run).items() if value is not None}
        self.table.put_item(Item={**item, "id": RUN + run_id, **({} if "open" in more else {"open": state.value})})
        return run_id

    def published(self, dataset: str, number: int, verdict: str, tuned: float, **result: Any) -> str:
        """A published run with its model package. `result` are the parts of result.json about its line."""
        container = {"Image": "image", "ModelDataUrl": "s3://b/model"}
        package = self.sagemaker.create_model_package(
            ModelPackageGroupName=MODELS,
            ModelApprovalStatus=APPROVAL[verdict],
            ClientToken=f"{object_keys.slug(dataset)}-{number}",
            InferenceSpecification={
                "Containers": [container],
                "SupportedContentTypes": ["a/b"],
                "SupportedResponseMIMETypes": ["a/b"],
            },
        )["ModelPackageArn"]
        run_id = self.run(dataset, number, RunState.PUBLISHED, verdict=verdict, model_package=package, open=None)
        comparison = {"base_score": BASE, "tuned_score": tuned, "lift": tuned - BASE, "tests": 40}
        document = {
            "run_id": run_id,
            "verdict": verdict,
            "comparison": comparison,
            "cost": {"usd": None},
            "reasons": [],
            "artifacts": {"merged_model": "s3://b/model"},
            "model_package": package,
            "cut": {},
            "config": {"model": "base", "seed": number},
        }
        self.world.write(object_keys.run_key(run_id, "result.json"), json.dumps(document | result).encode())
        self.world.write(object_keys.run_key(run_id, "report.html"), b"report")
        numbers = dict.fromkeys(("low", "high", "wins", "ties", "losses", "rows"), 0)
        unknown = dict.fromkeys(("steps", "seconds", "usd", "learning_rate"))
        against, start = result.get("champion") or {}, result.get("start") or {}
        indexed = {"run_id": run_id, "dataset": dataset, "attempt": 1, "verdict": verdict, "model": "base", "tests": 40}
        indexed |= {"published": f"2026-11-{number:02}", "base": BASE, "tuned": tuned, "lift": tuned - BASE}
        indexed |= {"line": object_keys.line_of(dataset), "start": start.get("run_id"), "champion": against.get("run_id")}
        indexed |= {"champion_lift": None, "rewards": [], "reward": [], **numbers, **unknown}
        self.index.append(msgspec.convert(indexed, IndexedRun))
        self.world.write(object_keys.INDEX, render_index(self.index).encode())
        return run_id

    def line(self, name: str, runs: dict[int, str], champion: int | None = None, day: int = 28, tries: int = 0) -> None:
        """A line item. `runs` has a run for each package version, and `champion` is such a version."""
        arn = f"arn:aws:sagemaker:us-east-1:123456789012:model-package/{MODELS}/{champion}"
        item: dict[str, Any] = {
            "id": f"line#{name}",
            "line": name,
            "open": "LINE",
            "version": 3,
            "announced": 2,
            "suite": "5eed",
            "arrived": f"2026-11-{day}T12:00:00.000000+00:00",
            "tries": list(runs.values())[len(runs) - tries :],
            "packages": {str(version): run_id for version, run_id in runs.items()},
        }
        self.table.put_item(Item=item | ({"champion": runs[champion], "champion_package": arn} if champion else {}))

    def status(self, run_id: str) -> tuple[str, str]:
        """What the registry says of a run's model: approval status and its reason."""
        arn = self.world.run(run_id).model_package
        package = self.sagemaker.describe_model_package(ModelPackageName=arn)
        return package["ModelApprovalStatus"], package.get("ApprovalDescription", "")

    def delete_package(self, run_id: str) -> None:
        """Delete a run's model package. Moto has no DeleteModelPackage."""
        backend = sagemaker_backends["123456789012"]["us-east-1"]
        del backend.model_packages[self.world.run(run_id).model_package]


@pytest.fixture
def made(world: World) -> Made:
    return Made(world)


@pytest.fixture
def math(made: Made) -> dict[str, str]:
    """A line of a folder: b and c were champions, d is, e and f were judged against d, and g is trained; x failed."""
    against = {"comparison": {"lift": -0.1}}
    a = made.published("math/a", 1, "REJECTED", 0.2, start=None, champion=None)
    b = made.published("math/b", 2, "APPROVED", 0.5, start=None, champion=None)
    c = made.published(
        "math/c", 3, "APPROVED", 0.75, start={"run_id": b}, champion={"run_id": b, "comparison": {"lift": 0.25}}
    )
    d = made.published(
        "math/d", 4, "APPROVED", 0.875, start={"run_id": c}, champion={"run_id": c, "comparison": {"lift": 0.1}}
    )
    e = made.published("math/e", 5, "PENDING", 0.8, start={"run_id": b}, champion={"run_id": d} | against)
    f = made.published(
        "math/f", 6, "REJECTED", 0.7, start={"run_id": "other-00000000000f"}, champion={"run_id": d} | against
    )
    g, x = made.run("math/g", 7), made.run("math/x", 8, RunState.TRAINING_FAILED, open=None)
    runs = {"a": a, "b": b, "c": c, "d": d, "e": e, "f": f}
    made.line("math", dict(enumerate(runs.values(), 1)), champion=4, tries=2)
    return runs | {"g": g, "x": x}


def cells(text: str) -> list[list[str]]:
    return [re.split(r"  +", line.strip()) for line in text.splitlines()]


# --- lists ---


def test_lines_lists_champions_scores_and_trends(made: Made, math: dict[str, str], tunedrop: Command) -> None:
    made.line("newer", {}, day=29)
    assert cells(tunedrop("lines")) == [
        ["line", "champion", "score", "over base", "published", "judged since", "trend"],
        ["newer", "none", "0", "0"],
        ["math", math["d"], "0.875", "+0.625", "6", "2", "▁▆█"],
    ]
    empty, full = json.loads(tunedrop("lines", "--json"))["lines"]
    assert (empty["line"], empty["champion"], empty["score"], empty["trend"]) == ("newer", None, None, [])
    assert full["champion"] == math["d"]
    assert full["champion_package"].endswith(f"{MODELS}/4")
    assert (full["score"], full["lift"], full["published"], full["trend"]) == (0.875, 0.625, 6, [0.5, 0.75, 0.875])
    assert full["tries"] == [math["e"], math["f"]]


def test_without_lines_the_list_says_how_to_begin(tunedrop: Command) -> None:
    assert tunedrop("lines") == "No lines. The first run of a line makes it: start one with `tunedrop drop FILE`.\n"
    assert json.loads(tunedrop("lines", "--json")) == {"version": 1, "lines": []}


def test_a_champion_that_a_person_approved_is_in_the_trend(made: Made, tunedrop: Command) -> None:
    """Its verdict is PENDING, and no run was compared with it yet."""
    made.line("cars", {1: made.published("cars", 1, "PENDING", 0.5)}, champion=1)
    assert json.loads(tunedrop("lines", "--json"))["lines"][0]["trend"] == [0.5]


@pytest.mark.parametrize(
    ("values", "bars"),
    [([], ""), ([0.5], "▁"), ([0.5, 0.5], "▁▁"), ([0.0, 1.0], "▁█"), ([0.9, 0.1, 0.5], "█▁▅"), ([-2.0, 2.0, 0.0], "▁█▅")],
)
def test_a_sparkline_goes_from_the_smallest_to_the_largest_value(values: list[float], bars: str) -> None:
    assert sparkline(values) == bars


def test_runs_names_a_line_that_is_not_the_datasets(made: Made, tunedrop: Command) -> None:
    cars = made.run("cars", 1, line="cars")
    assert cells(tunedrop("runs"))[0][:2] == ["run", "state"]
    math, trucks = made.run("math/a", 2), made.run("trucks", 3, line="vehicles", start=cars)
    header, third, second, first = cells(tunedrop("runs"))
    assert header[:3] == ["run", "line", "state"]
    assert (first[:2], second[:3]) == ([cars, "training"], [math, "math", "training"])
    assert third[:3] == [trucks, "vehicles", "training"]
    assert ["started from", cars] in cells(tunedrop("show", "trucks"))
    assert ["line", "math"] in cells(tunedrop("show", math))
    assert not any(row[0] == "line" for row in cells(tunedrop("show", cars)))


# --- history ---


def test_show_of_a_line_is_a_tree_of_what_started_from_what(math: dict[str, str], tunedrop: Command) -> None:
    facts, tree = tunedrop("show", "math").split("run   ", 1)
    assert dict(cells(facts)) == {
        "line": "math",
        "champion": math["d"],
        "model package": f"arn:aws:sagemaker:us-east-1:123456789012:model-package/{MODELS}/4",
        "since": "2026-11-28 12:00:00",
        "judged since": f"{math['e']}, {math['f']}",
    }
    a, b, c, d, e, f, g = (math[name] for name in "abcdefg")
    rows = [re.sub(r"  +", "  ", line) for line in tree.splitlines()[1:]]
    expected = [
        "base model",
        f"├ {a}  2026-11-01  REJECTED  1 Rejected  0.200  -0.050",
        f"├ {b}  2026-11-02  APPROVED  2 Approved  0.500  +0.250",
        f"│ ├ {c}  2026-11-03  APPROVED  3 Approved  0.750  +0.500  +0.250 ({b})",
        f"│ │ └ {d}  2026-11-04  APPROVED  4 Approved  0.875  +0.625  +0.100 ({c})  ← champion",
        f"│ └ {e}  2026-11-05  PENDING  5 PendingManualApproval  0.800  +0.550  -0.100 ({d})",
        f"└ {g}  2026-11-07  training",
        "other-00000000000f",
        f"└ {f}  2026-11-06  REJECTED  6 Rejected  0.700  +0.450  -0.100 ({d})",
    ]
    assert rows == expected


def test_show_as_json_has_every_run_of_the_line(math: dict[str, str], tunedrop: Command) -> None:
    document = json.loads(tunedrop("show", "math", "--json"))
    assert document["run"] is document["result"] is None
    shown = document["line"]
    assert (shown["line"], shown["champion"], shown["newest_approved"]) == ("math", math["d"], math["d"])
    runs = {run["run_id"]: run for run in shown["runs"]}
    assert list(runs) == [math[name] for name in "abcdefg"]
    assert {name: runs[math["c"]][name] for name in ("start", "champion", "champion_lift", "approval", "tuned_score")} == {
        "start": math["b"],
        "champion": math["b"],
        "champion_lift": 0.25,
        "approval": "Approved",
        "tuned_score": 0.75,
    }
    assert runs[math["g"]] | {"state": "training", "verdict": None, "approval": None} == runs[math["g"]]


def test_a_name_of_a_dataset_and_a_line_shows_both(made: Made, tunedrop: Command) -> None:
    first, second = made.published("cars", 1, "APPROVED", 0.5), made.published("cars", 2, "PENDING", 0.6)
    made.published("cars-eu", 3, "REJECTED", 0.1)  # a later run of another dataset, whose id begins with the name
    made.line("cars", {1: first, 2: second}, champion=1)
    shown = tunedrop("show", "cars")
    assert shown.startswith(f"run            {second}\n")
    assert f"\n\nline           cars\nchampion       {first}\n" in shown
    assert f"└ {second}" in shown
    document = json.loads(tunedrop("show", "cars", "--json"))
    assert (document["run"]["run_id"], document["result"]["verdict"]) == (second, "PENDING")
    assert document["line"]["line"] == "cars"
    assert json.loads(tunedrop("show", first, "--json"))["line"] is None
    assert "← champion" not in tunedrop("show", first)


def test_show_says_what_the_registry_has_changed(made: Made, math: dict[str, str], tunedrop: Command) -> None:
    """A person approved a package a moment ago, and deleted another one."""
    made.sagemaker.update_model_package(
        ModelPackageArn=made.world.run(math["e"]).model_package, ModelApprovalStatus="Approved"
    )
    made.delete_package(math["b"])
    shown = tunedrop("show", "math")
    assert f"The newest approved model package is that of {math['e']}: it becomes the champion." in shown
    assert re.search(rf"{math['b']} +2026-11-02 +APPROVED +deleted ", shown)


# --- approvals ---


def test_approve_and_reject_say_who_is_champion_and_how_to_undo(made: Made, math: dict[str, str], tunedrop: Command) -> None:
    said = dict(cells(tunedrop("approve", math["e"], "--reason", " passed\nthe review ")))
    assert made.status(math["e"]) == ("Approved", "passed the review")
    assert (said["run"], said["approval"]) == (math["e"], "Approved (before: PendingManualApproval)")
    assert said["champion of math"] == math["e"]
    arn = made.world.run(math["e"]).model_package
    expected = (
        f"`aws sagemaker update-model-package --model-package-arn {arn} --model-approval-status PendingManualApproval`"
    )
    assert said["undo"] == expected

    said = dict(cells(tunedrop("reject", math["e"])))
    assert made.status(math["e"]) == ("Rejected", "Rejected with `tunedrop reject`.")
    assert (said["champion of math"], said["undo"]) == (math["d"], f"`tunedrop approve {math['e']}`")
    assert dict(cells(tunedrop("reject", math["e"])))["undo"] == "nothing has changed"
    # An older model that is approved does not replace a newer champion.
    assert dict(cells(tunedrop("approve", "math/a")))["champion of math"] == math["d"]
    document = json.loads(tunedrop("approve", "math/a", "--json"))
    assert (document["run_id"], document["before"], document["champion"]) == (math["a"], "Approved", math["d"])


def test_rollback_goes_back_through_the_champions(made: Made, math: dict[str, str], tunedrop: Command) -> None:
    for rejected, champion in (("d", math["c"]), ("c", math["b"]), ("b", "none: no model package of the line is approved")):
        said = dict(cells(tunedrop("rollback", "math", "--reason", f"bad {rejected}")))
        assert (said["run"], said["approval"]) == (math[rejected], "Rejected (before: Approved)")
        assert (said["champion of math"], said["undo"]) == (champion, f"`tunedrop approve {math[rejected]}`")
        assert made.status(math[rejected]) == ("Rejected", f"bad {rejected}")
    assert "The line 'math' has no champion: no model of it is approved." in tunedrop("rollback", "math")
    assert [made.status(math[name])[0] for name in "aef"] == ["Rejected", "PendingManualApproval", "Rejected"]


def test_a_champion_without_a_package_is_not_rolled_back(made: Made, math: dict[str, str], tunedrop: Command) -> None:
    """The gate approved g, whose publication goes on: the newest approved package is still that of the champion before."""
    made.table.update_item(
        Key={"id": "line#math"},
        UpdateExpression="SET champion = :run REMOVE champion_package",
        ExpressionAttributeValues={":run": math["g"]},
    )
    assert f"{math['g']} was approved a moment ago, and its model package is not in the registry yet" in tunedrop(
        "rollback", "math"
    )
    assert made.status(math["d"])[0] == "Approved"


def test_the_champion_is_the_newest_approved_model_after_any_decisions(
    made: Made, math: dict[str, str], tunedrop: Command
) -> None:
    names, chance = "abcdef", random.Random(0)
    model = {name: made.status(math[name])[0] for name in names}
    for _ in range(16):
        command = chance.choice(["approve", "reject", "rollback"])
        approved = [name for name in names if model[name] == "Approved"]
        if command == "rollback" and not approved:
            continue
        name = approved[-1] if command == "rollback" else chance.choice(names)
        said = dict(cells(tunedrop(command, "math" if command == "rollback" else math[name])))
        model[name] = "Approved" if command == "approve" else "Rejected"
        assert {each: made.status(math[each])[0] for each in names} == model
        newest = next((math[each] for each in reversed(names) if model[each] == "Approved"), "none")
        assert said["run"] == math[name]
        assert said["champion of math"].split(":")[0] == newest


def test_a_run_of_no_line_is_approved_too(made: Made, tunedrop: Command) -> None:
    """A run from before its stack had lines."""
    run_id = made.published("cars", 1, "PENDING", 0.5)
    assert "champion" not in tunedrop("approve", "cars")
    assert made.status(run_id)[0] == "Approved"


def test_mistakes_have_a_way_out(made: Made, math: dict[str, str], tunedrop: Command) -> None:
    made.line("maths-eu", {})
    foreign = "arn:aws:sagemaker:us-east-1:123456789012:model-package/another-stack/7"
    made.run("copied", 11, RunState.PUBLISHED, model_package=foreign)
    made.delete_package(math["b"])
    cases = [
        (
            ("rollback", "mathe"),
            "There is no line 'mathe'. Did you mean 'math' or 'maths-eu'? List the lines with `tunedrop lines`.",
        ),
        (("rollback", "zebra"), "There is no line 'zebra'. List the lines with `tunedrop lines`."),
        (
            ("rollback", "maths-eu"),
            "The line 'maths-eu' has no champion: no model of it is approved. Its runs: `tunedrop show m",
        ),
        (("show", "mahts-eu"), "There is no run 'mahts-eu'. Did you mean 'maths-eu'"),
        (("approve", "copies"), "There is no run 'copies'. Did you mean 'copied'"),
        (("approve", "math/g"), f"{math['g']} has no model package: it is training. A run has one from its publication on."),
        (("reject", "math/x"), f"{math['x']} has no model package: it is training failed."),
        (("reject", "copied"), f"{foreign} is in the model package group of another stack: this stack's group is {MODELS}."),
        (
            ("approve", math["b"]),
            "does not exist: it was deleted, or belongs to another account or region. Approve another run,",
        ),
        (("compare", "maths-eu"), "The line 'maths-eu' has no champion"),
        (("compare", "math", "maths-eu", "--champions"), "The line 'maths-eu' has no champion"),
        (("compare", "mth"), "There is no line 'mth'. Did you mean 'math'"),
        (("event", foreign), f"The model package {foreign} does not exist"),
    ]
    for arguments, message in cases:
        assert message in tunedrop(*arguments), arguments


# --- comparisons ---


def test_compare_of_a_line_has_a_column_for_each_champion(math: dict[str, str], tunedrop: Command) -> None:
    b, c, d = (math[name] for name in "bcd")
    rows = cells(tunedrop("compare", "math"))
    assert rows[0] == [b, c, d]
    assert ["tuned score", "0.5", "0.75", "0.875"] in rows
    assert ["started from", b, c] in rows
    assert ["config: seed", "2", "3", "4"] in rows
    assert not any(row[0] == "cost in USD" for row in rows)
    document = json.loads(tunedrop("compare", "math", "--json"))
    assert (document["runs"], document["figures"]["tuned score"]) == ([b, c, d], [0.5, 0.75, 0.875])
    assert document["config"]["seed"] == [2, 3, 4]


def test_compare_of_a_line_has_the_newest_five(made: Made, tunedrop: Command) -> None:
    runs = {number: made.published("cars", number, "APPROVED", number / 10) for number in range(1, 8)}
    made.line("cars", runs, champion=7)
    assert cells(tunedrop("compare", "cars"))[0] == [runs[number] for number in range(3, 8)]


def test_compare_of_two_lines_is_of_their_champions(made: Made, math: dict[str, str], tunedrop: Command) -> None:
    cars = made.published("cars", 9, "APPROVED", 0.5)
    newer = made.published("cars", 10, "REJECTED", 0.1)
    made.line("cars", {7: cars, 8: newer}, champion=7)
    assert cells(tunedrop("compare", "cars", "math", "--champions"))[0] == [cars, math["d"]]
    assert cells(tunedrop("compare", "cars", math["d"]))[0] == [newer, math["d"]]  # as ever: the newest run


def test_an_index_of_another_make_is_named(world: World, made: Made, tunedrop: Command) -> None:
    made.line("cars", {})
    world.write(object_keys.INDEX, b"<html></html>")
    assert "runs/index.html contains no data about runs" in tunedrop("lines")
    assert ARTIFACTS not in tunedrop("lines")


def test_the_stack_does_what_the_commands_say(world: World, tunedrop: Command) -> None:
    """Three runs of the pipeline, each better than the champion; the commands' packages ring at the stack by real events."""

    def result(score: float) -> dict[str, Any]:
        return {"text": str(score), "score": score, "rewards": {"exact_match": score}, "passed": True}

    runs = []
    for number, (tuned, before) in enumerate([(0.5, None), (0.75, 0.5), (1.0, 0.75)]):
        world.put("training_data/cars.yaml", b"start_from: champion" if before else b"")
        scores = {"base": 0.0, "tuned": tuned} | ({} if before is None else {"champion": before})
        tests = [test | {name: result(score) for name, score in scores.items()} for test in WON]
        row = b'{"question": "%d+1?", "answer": "%d"}\n' % (100 + number, 101 + number)
        run = world.tested(world.trained(world.drop("training_data/cars.jsonl", GOOD_DATA + row)), tests)
        assert run.verdict == "APPROVED"
        runs.append(run)
    one, two, three = (run.run_id for run in runs)
    tree = [row for row in cells(tunedrop("show", "cars")) if "└" in row[0]]
    assert [row[0] for row in tree] == [f"└ {one}", f"└ {two}", f"└ {three}"]
    assert [row[-1] for row in tree][-1] == "← champion"
    assert json.loads(tunedrop("lines", "--json"))["lines"][0]["trend"] == [0.5, 0.75, 1.0]
    assert cells(tunedrop("compare", "cars"))[0] == [one, two, three]

    decisions = [("rollback", "cars", two), ("reject", two, one), ("approve", three, three), ("approve", two, three)]
    for command, name, expected in decisions:
        said = dict(cells(tunedrop(command, name)))
        assert said["champion of cars"] == expected
        event = json.loads(tunedrop("event", said["model package"]))
        world.handle("publish_results", event)
        line = world.aws.lines.get("cars")
        assert line.champion == expected
        assert line.champion_package == world.run(expected).model_package


def test_init_goes_on_from_the_champion(world: World, tunedrop: Command, tmp_path: Path) -> None:
    """The proposed config passes validation, and the run starts from the champion's adapter."""
    file = tmp_path / "cars.jsonl"
    file.write_bytes(GOOD_DATA)
    tunedrop("init", str(file), "--yes", "--output", str(tmp_path / "first.yaml"))
    assert "start_from" not in (tmp_path / "first.yaml").read_text()
    world.put("training_data/cars.yaml", b"lora: {r: 8}\n")
    champion = world.tested(world.trained(world.drop()))
    tunedrop("init", str(file), "--yes")
    config = (tmp_path / "cars.yaml").read_text()
    assert "start_from: champion" in config
    assert champion.run_id in config
    assert "r: 8" in config
    world.put("training_data/cars.yaml", config.encode())
    run = world.drop(body=GOOD_DATA + GOOD_DATA)
    assert (run.state, run.start) == ("VALIDATED", champion.run_id)
