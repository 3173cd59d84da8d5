import json

import pytest

from tunedrop.problems import RejectedError
from tunedrop.run_config import GRPO_DEFAULTS, MANAGED_GRPO, MANAGED_LORA, config_fields, load_run_config, parse_run_config


def load(text: str | bytes):
    return load_run_config(text if isinstance(text, bytes) else text.encode(), default_model="base")


def test_an_empty_config_is_the_defaults():
    config = load(b"")
    assert config.model == "base"
    assert config.grpo == GRPO_DEFAULTS
    assert config.lora.peft_kwargs() == {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def test_a_full_config_survives_the_way_to_the_trainer():
    config = load("""
        model: SmolLM2-135M-Instruct
        system_prompt: "It's $(a) \\"test\\"\\nline"
        columns: {prompt: Question, answer: Answer}
        rewards: [{type: exact_match, weight: 2.0}, {type: xml_format, mode: soft, weight: 0.5}]
        lora: {r: 32, lora_alpha: 64, lora_dropout: 0.05, load_in_4bit: true}
        grpo: {learning_rate: 1e-5, num_generations: 4, loss_type: dr_grpo, beta: 0.04}
        compute: {instance_type: ml.g5.xlarge, spot: true, max_runtime: 1h30m, max_cost_usd: 40}
        gate: {min_lift: 0.1, must_not_regress: [math]}
    """)
    assert config.grpo["learning_rate"] == 1e-5
    assert config.compute.max_runtime == 5400
    assert config.compute.instance_type == ["ml.g5.xlarge"]
    assert config.lora.peft_kwargs()["lora_dropout"] == 0.05
    assert parse_run_config(json.loads(config.model_dump_json())) == config


MISTAKES = [
    # config, code, key, words of the message or hint
    ("modle: x", "CONFIG_KEY", "modle", "did you mean 'model'"),
    ("grpo: {lerning_rate: 1}", "CONFIG_KEY", "grpo.lerning_rate", "did you mean 'learning_rate'"),
    ("lora: {lora_alfa: 1}", "CONFIG_KEY", "lora.lora_alfa", "did you mean 'lora_alpha'"),
    ("compute: {spott: true}", "CONFIG_KEY", "compute.spott", "did you mean 'spot'"),
    ("grpo: {learning_rate: fast}", "CONFIG_VALUE", "grpo", "'learning_rate' must be float, got str 'fast'"),
    ("grpo: {num_generations: 2.5}", "CONFIG_VALUE", "grpo", "must be int or null, got float"),
    ("grpo: {bf16: 1}", "CONFIG_VALUE", "grpo", "must be bool or null, got int"),
    ("grpo: {loss_type: dap}", "CONFIG_VALUE", "grpo", "must be one of grpo, bnpo"),
    ("grpo: {output_dir: /tmp}", "CONFIG_VALUE", "grpo", "set by Tunedrop"),
    ("grpo: 3", "CONFIG_VALUE", "grpo", "dictionary"),
    ("lora: {r: x}", "CONFIG_VALUE", "lora.r", "valid integer"),
    ("rewards: []", "CONFIG_VALUE", "rewards", "at least 1"),
    ("rewards: [{type: exact}]", "CONFIG_VALUE", "rewards.0", "did you mean 'exact_match'"),
    ("rewards: [{type: regex}]", "CONFIG_VALUE", "rewards.0.pattern", "required"),
    ("rewards: [{type: length}, {type: length}]", "CONFIG_VALUE", None, "two rewards are called 'length'"),
    ("rewards: [{type: length, weight: 0}]", "CONFIG_VALUE", None, "nothing to learn"),
    ("grpo: {num_generations: 1}", "CONFIG_VALUE", None, "at least 2"),
    ("{lora: {load_in_4bit: true}, grpo: {use_vllm: true}}", "CONFIG_VALUE", None, "do not work together"),
    ("compute: {max_runtime: 3 hours}", "CONFIG_VALUE", "compute.max_runtime", "such as 3h"),
    ("compute: {instance_type: g5.xlarge}", "CONFIG_VALUE", "compute.instance_type.0", "pattern"),
    ("model: ../secrets", "CONFIG_VALUE", "model", "pattern"),
    ("a: [", "CONFIG_SYNTAX", None, "not valid YAML"),
    ("model: a\nmodel: b", "CONFIG_SYNTAX", None, "given twice"),
    ("a: &x [1]\nb: [*x, *x]", "CONFIG_SYNTAX", None, "aliases are not accepted"),
    ("!!python/object/apply:os.system [ls]", "CONFIG_SYNTAX", None, "python/object"),
    ("[1]", "CONFIG_SYNTAX", None, "must be a mapping"),
    ("[" * 50_000, "CONFIG_SYNTAX", None, "recursion"),
    (b"\xff\xfem", "CONFIG_SYNTAX", None, "not UTF-8"),
    (b"#" * 300_000, "CONFIG_SYNTAX", None, "at most"),
]


@pytest.mark.parametrize(("text", "code", "key", "words"), MISTAKES, ids=lambda value: str(value)[:30])
def test_mistakes_are_named(text, code, key, words):
    with pytest.raises(RejectedError) as caught:
        load(text)
    problem = caught.value.problems[0]
    assert (problem.code, problem.key) == (code, key)
    assert words in f"{problem.message} {problem.hint}"


def test_a_syntax_error_names_its_line():
    with pytest.raises(RejectedError) as caught:
        load("model: a\nrewards:\n  - {type: x\n")
    assert caught.value.problems[0].line is not None


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(RejectedError) as caught:
        load("{modle: x, gates: {}, compute: {spott: 1}}")
    assert {problem.key for problem in caught.value.problems} == {"modle", "gates", "compute.spott"}


def test_managed_fields_exist_in_the_pinned_versions():
    assert set(config_fields()["grpo"]) >= MANAGED_GRPO
    assert set(config_fields()["lora"]) >= MANAGED_LORA
