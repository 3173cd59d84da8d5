import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import CHAT_TEMPLATE
from tiny_tokenizer import tokenizer_files

from pipeline.validation import tokens
from pipeline.validation.tokens import PromptTokens, TokenCounter, TokenizerError
from tunedrop.config.parse import parse_run_config

USER = {"role": "user", "content": "What is 1 + 1?"}
PROMPTS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Größe, 日本 <|other|>\n\n"}],
]
TEMPLATES = [
    CHAT_TEMPLATE,
    # what published templates do: trimmed blocks, loop controls, special tokens, JSON, namespaces, generation marks
    """{{ bos_token }}{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
<|{{ message['role'] }}|>
{{ message['content'] | trim }}{{ eos_token }}
{% generation %}{{ message | tojson }}{% endgeneration %}
{%- endfor %}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}{% endfor %}{{ ns.n }}
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{{ strftime_now('%Y') | length }}{% if add_generation_prompt %}<|assistant|>{% endif %}""",
]


def model(folder, template=CHAT_TEMPLATE, **files):
    """Write the small files of a model with this template."""
    written = tokenizer_files()
    config = json.loads(written["tokenizer_config.json"]) | {
        "bos_token": {"__type": "AddedToken", "content": "<|user|>"},
        "chat_template": template,
    }
    written |= {"tokenizer_config.json": json.dumps(config).encode()}
    for name, raw in (written | files).items():
        (folder / name).write_bytes(raw)
    return folder


@pytest.fixture
def count(tmp_path):
    """Start a counter for a template; it ends with the test."""
    started = []

    def start(template=CHAT_TEMPLATE, kwargs=None, **files):
        started.append(TokenCounter(model(tmp_path, template, **files), kwargs))
        return started[-1]

    yield start
    for counter in started:
        counter.close()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
def test_prompts_are_rendered_and_counted_as_transformers_does(count, tmp_path, template, kwargs):
    from transformers import AutoTokenizer

    counter = count(template, kwargs)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True, **kwargs) for p in PROMPTS]
    assert counter.render(PROMPTS) == expected
    counts = [
        len(tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False, **kwargs)) for p in PROMPTS
    ]
    assert counter.count_prompts(PROMPTS) == counts


def test_where_the_template_may_be(count):
    assert count(None, **{"chat_template.jinja": b"file {{ messages[0].content }}"}).render([[USER]])[0].startswith("file")
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "default"}]
    assert count(several, **{"chat_template.jinja": b"file"}).render([[USER]]) == ["file"]


def test_a_template_among_several_is_the_default(count):
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "default"}]
    assert count(several).render([[USER]]) == ["default"]


HOSTILE = [
    # a template, words of what is said of it
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{{ 'x' * 10**10 }}", "MemoryError"),
    ("{{ 'x' | center(10**10) }}", "MemoryError"),
    ("{% if", "TemplateSyntaxError"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it took more than"),
]


@pytest.mark.parametrize(("template", "words"), HOSTILE)
def test_a_template_can_do_nothing_but_fail(count, monkeypatch, template, words):
    if words == "it took more than":
        monkeypatch.setattr(tokens, "LIMIT_SECONDS", 1.0)
    with pytest.raises(TokenizerError, match=words.replace("(", r"\(")):
        count(template).render([[USER]])


BROKEN = [
    ({"tokenizer.json": b"{}"}, "tokenizer.json"),
    ({"tokenizer.json": b"\x00\xff"}, "tokenizer.json"),
    ({"tokenizer.json": b"[" * 100_000}, "tokenizer.json"),
    ({"tokenizer_config.json": b"[]"}, "tokenizer_config.json is not an object"),
    ({"tokenizer_config.json": b"{}"}, "no chat template"),
    ({"tokenizer_config.json": b'{"chat_template": "' + b"x" * 9_000_000 + b'"}'}, "larger than 8 MiB"),
]


@pytest.mark.parametrize(("files", "words"), BROKEN, ids=lambda value: str(value)[:30])
def test_a_tokenizer_that_cannot_be_used_is_said_so(count, files, words):
    with pytest.raises(TokenizerError) as caught:
        count(**files)
    assert words in str(caught.value)


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    counter = TokenCounter(model(tmp_path_factory.mktemp("model")))
    yield counter
    counter.close()


CONTENTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
CONVERSATIONS = st.lists(CONTENTS, min_size=1, max_size=4).map(
    lambda texts: [{"role": "user" if n % 2 else "assistant", "content": text} for n, text in enumerate(texts)]
)


@settings(max_examples=40, deadline=None)
@given(st.lists(CONVERSATIONS, min_size=1, max_size=20), st.integers(1, 120), st.sampled_from([None, "Be brief."]))
def test_every_prompt_over_the_limit_is_found(counter, prompts, limit, system):
    config = parse_run_config({"model": "m", "max_prompt_length": limit, "system_prompt": system})
    prompts = [[{"role": "system", "content": system}, *prompt] if system else prompt for prompt in prompts]
    rows = [{"id": "i", "prompt": prompt, "answer": "a"} for prompt in prompts]
    sizes = [
        sum(len(m["content"].encode()) for m in prompt if m["role"] != "system") + len(prompt) - 1 for prompt in prompts
    ]
    found = PromptTokens(counter, config).add(rows, sizes)
    counts = counter.count_prompts(prompts)
    assert found == [(n, tokens) for n, tokens in enumerate(counts) if tokens > limit]


def test_short_prompts_are_not_counted_and_long_ones_all_are(counter):
    config = parse_run_config({"model": "m", "max_prompt_length": 200})
    generator = random.Random(0)
    rows: list[dict[str, Any]] = [
        {"id": str(n), "prompt": [{"role": "user", "content": "x" * generator.randrange(300)}], "answer": "a"}
        for n in range(500)
    ]
    counting = PromptTokens(counter, config)
    over = counting.add(rows, [len(row["prompt"][0]["content"]) for row in rows])
    found, warnings = counting.result(rows[:50])
    exact = counter.count_prompts([row["prompt"] for row in rows])
    assert len(over) == found["over_limit"] == sum(count > 200 for count in exact)
    assert found["longest_prompt"] == max(exact)
    assert found["counted"] < 250
    assert found["suggested"] == {"max_prompt_length": -(-max(exact) // 32) * 32}
    assert f"prompts of more than 200 tokens, which will be dropped (prompt_overflow: drop): {len(over)};" in warnings[0]


def test_when_time_is_up_long_prompts_are_no_longer_counted(counter, monkeypatch):
    monkeypatch.setattr(tokens, "COUNTING_SECONDS", 0.0)
    counting = PromptTokens(counter, parse_run_config({"model": "m", "max_prompt_length": 5}))
    rows = [{"id": "1", "prompt": [USER], "answer": "a"}]
    assert counting.add(rows, [14]) == []
    found, warnings = counting.result(rows)
    assert found["not_counted"] == 1
    assert "were not counted for lack of time: 1" in warnings[0]


def test_roles_that_the_template_refuses_are_found_without_a_row_that_has_them_in_the_sample(count):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}x"
    )
    counting = PromptTokens(count(template), parse_run_config({"model": "m"}))
    (problem,) = counting.refused([("user",), ("system", "user")])
    assert problem.code == "CHAT_TEMPLATE"
    assert "system, user" in problem.message
    assert "no system role" in problem.message
