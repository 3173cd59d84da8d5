"""What the stack's parameters let rewards do: nothing by default, and then what is named and nothing beside it."""

import re
from typing import Any

import pytest
from permissions import ACCOUNT, REGION, Permission, allows, needless
from template import Json, load_template, of_type, resolve

from tunedrop.rewards import REWARD_ENVIRONMENT

TEMPLATE = load_template()
FUNCTION = f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:score"
MODEL = "eu.amazon.nova-lite-v1:0"
SECRET = f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:judges-AbCdEf"
PROFILE = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:inference-profile/{MODEL}"


def given(**parameters: str) -> dict[str, str]:
    defaults = {name: str(parameter.get("Default", "")) for name, parameter in TEMPLATE["Parameters"].items()}
    stack = {"AWS::Partition": "aws", "AWS::Region": REGION, "AWS::AccountId": ACCOUNT}
    return defaults | stack | parameters


def holds(condition: Any, known: dict[str, str]) -> bool:
    match condition:
        case {"Condition": name}:
            return holds(TEMPLATE["Conditions"][name], known)
        case {"Fn::Not": [one]}:
            return not holds(one, known)
        case {"Fn::Or": several}:
            return any(holds(one, known) for one in several)
        case {"Fn::And": several}:
            return all(holds(one, known) for one in several)
        case {"Fn::Equals": [one, other]}:
            return bool(resolve(one, known) == resolve(other, known))
    raise AssertionError(condition)


def statements(**parameters: str) -> list[Json]:
    """The statements that a stack with these parameters gives to the jobs and to validate_dataset."""
    known = given(**parameters)
    if not holds({"Condition": TEMPLATE["Resources"]["RewardPolicy"]["Condition"]}, known):
        return []
    conditions = {name: holds(condition, known) for name, condition in TEMPLATE["Conditions"].items()}
    policy = of_type(TEMPLATE, "AWS::IAM::ManagedPolicy")["RewardPolicy"]["PolicyDocument"]
    return resolve(policy["Statement"], known, conditions)


def invoke(function: str) -> Permission:
    return Permission("jobs", "lambda:InvokeFunction", function)


def ask(model: str, through: str = "") -> Permission:
    context = {"bedrock:InferenceProfileArn": through} if through else {}
    return Permission("jobs", "bedrock:InvokeModel", f"arn:aws:bedrock:{model}", context)


def read(secret: str) -> Permission:
    return Permission("jobs", "secretsmanager:GetSecretValue", secret)


def decrypt(secret: str, via: str = f"secretsmanager.{REGION}.amazonaws.com", account: str = ACCOUNT) -> Permission:
    context = {"kms:ViaService": via, "kms:EncryptionContext:SecretARN": secret}
    return Permission("jobs", "kms:Decrypt", f"arn:aws:kms:{REGION}:{account}:key/0123", context)


def test_by_default_there_is_no_policy() -> None:
    assert statements() == []
    assert statements(AllowCodeRewards="true", AllowPythonRewards="true", RewardHttpHosts="example.com") == []


def test_the_jobs_and_who_tries_rewards_before_them_get_the_same() -> None:
    policy = of_type(TEMPLATE, "AWS::IAM::ManagedPolicy")["RewardPolicy"]
    assert policy["Roles"] == [{"Ref": "SageMakerRole"}, {"Ref": "ValidateDatasetRole"}]
    elsewhere = {name: r for name, r in TEMPLATE["Resources"].items() if name != "RewardPolicy" and "IAM" in r["Type"]}
    assert not re.search("lambda:Invoke|foundation-model|inference-profile|secretsmanager", str(elsewhere))


def test_only_the_named_functions_may_be_called() -> None:
    allowed = statements(RewardFunctionArns=f"{FUNCTION},{FUNCTION}:live")
    assert allows(allowed, invoke(FUNCTION))
    assert allows(allowed, invoke(f"{FUNCTION}:live"))
    for other in (f"{FUNCTION}2", f"{FUNCTION}:old", FUNCTION.replace("score", "tunedrop-publish-results")):
        assert not allows(allowed, invoke(other))
    assert not allows(allowed, ask(f"{REGION}::foundation-model/{MODEL}"))


def test_only_the_named_model_may_be_asked_and_its_profiles_model_only_through_it() -> None:
    allowed = statements(RewardJudgeModel=MODEL)
    assert allows(allowed, ask(f"{REGION}:{ACCOUNT}:inference-profile/{MODEL}"))
    assert allows(allowed, ask(f"{REGION}::foundation-model/{MODEL}"))
    behind = "eu-north-1::foundation-model/amazon.nova-lite-v1:0"
    assert allows(allowed, ask(behind, through=PROFILE))
    assert not allows(allowed, ask(behind))
    assert not allows(allowed, ask(behind, through=PROFILE.replace("lite", "pro")))
    assert not allows(allowed, ask(f"{REGION}::foundation-model/amazon.nova-pro-v1:0"))
    assert not allows(allowed, invoke(FUNCTION))


def test_only_the_named_secret_may_be_read_and_keys_decrypt_only_this_secret() -> None:
    allowed = statements(RewardHttpSecretArn=SECRET)
    needed = [read(SECRET), decrypt(SECRET)]
    assert all(allows(allowed, permission) for permission in needed)
    assert needless(allowed, needed) == []
    other = SECRET.replace("judges", "payroll")
    for forbidden in (
        read(other),
        read(f"{SECRET}2"),
        decrypt(other),
        decrypt(SECRET, via=f"s3.{REGION}.amazonaws.com"),
        decrypt(SECRET, account="210987654321"),
        Permission("jobs", "secretsmanager:PutSecretValue", SECRET),
        Permission("jobs", "secretsmanager:DescribeSecret", SECRET),
        Permission("jobs", "kms:Decrypt", f"arn:aws:kms:{REGION}:{ACCOUNT}:key/0123"),
        invoke(FUNCTION),
    ):
        assert not allows(allowed, forbidden), forbidden


@pytest.mark.parametrize("parameter", REWARD_ENVIRONMENT.values())
def test_what_is_allowed_is_an_output_that_the_launch_plan_is_made_of(parameter: str) -> None:
    assert TEMPLATE["Parameters"][parameter]["Default"] in {"", "false"}
    assert TEMPLATE["Outputs"][parameter]["Value"] == {"Ref": parameter}


@pytest.mark.parametrize(
    ("parameters", "fine"),
    [
        ({}, True),
        ({"RewardJudgeModel": MODEL}, False),
        ({"RewardFunctionArns": FUNCTION}, False),
        ({"RewardHttpHosts": "a.org"}, False),
        ({"RewardHttpSecretArn": SECRET}, False),
        ({"AllowCodeRewards": "true", "AllowPythonRewards": "true"}, True),
    ],
)
def test_isolated_jobs_exclude_rewards_that_call(parameters: dict[str, str], fine: bool) -> None:
    rule = TEMPLATE["Rules"]["IsolatedJobsCallNobody"]
    known = given(**parameters, EnableNetworkIsolation="true")
    assert holds(rule["RuleCondition"], known)
    assert not holds(rule["RuleCondition"], given(**parameters))
    assert holds(rule["Assertions"][0]["Assert"], known) == fine


PATTERNS = [
    ("RewardFunctionArns", FUNCTION, True),
    ("RewardFunctionArns", f"{FUNCTION},{FUNCTION}:$LATEST", True),
    ("RewardFunctionArns", "", True),
    ("RewardFunctionArns", "score", False),
    ("RewardFunctionArns", f"{FUNCTION},", False),
    ("RewardFunctionArns", f"{FUNCTION}*", False),
    ("RewardFunctionArns", "*", False),
    ("RewardJudgeModel", MODEL, True),
    ("RewardJudgeModel", "*", False),
    ("RewardJudgeModel", "a,b", False),
    ("RewardHttpHosts", "rewards.example.com,127.0.0.1:8080", True),
    ("RewardHttpHosts", "https://rewards.example.com", False),
    ("RewardHttpHosts", "*.example.com", False),
    ("RewardHttpSecretArn", SECRET, True),
    ("RewardHttpSecretArn", SECRET.replace("judges", "team/judges@eu+1=a.b_c"), True),
    ("RewardHttpSecretArn", "", True),
    ("RewardHttpSecretArn", "judges", False),
    ("RewardHttpSecretArn", SECRET.removesuffix("-AbCdEf"), False),
    ("RewardHttpSecretArn", SECRET.replace("judges", "*"), False),
    ("RewardHttpSecretArn", f"{SECRET},{SECRET}", False),
]


@pytest.mark.parametrize(("parameter", "value", "fits"), PATTERNS)
def test_parameters_take_names_and_no_wildcards(parameter: str, value: str, fits: bool) -> None:
    assert bool(re.fullmatch(TEMPLATE["Parameters"][parameter]["AllowedPattern"], value)) == fits
