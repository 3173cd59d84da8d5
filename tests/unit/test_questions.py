"""Which prompts ask the same question."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedrop.questions import outline, prompt_text, question, sketches

SAME = [
    ("What is 3 + 4?", "what is 3+4 ?"),
    ("A  table\twith\n\nspaces", "a table with spaces"),
    ("1,000 cars", "1000 cars"),
    ("1,234,567.50 USD", "1234567.5 usd"),
    ("2.0 and 007", "2 and 7"),
    ("It costs 5.", "it costs 5 ."),
    ("GRÜSSE AUS ÖTZ", "grüsse aus ötz"),
    ("0.00", "0"),
]
DIFFERENT = [
    ("What is 3 + 4?", "What is 3 - 4?"),
    ("Add 1 23", "Add 12 3"),
    ("1.5", "15"),
    ("1,000", "1,0000"),
    ("10", "100"),
    ("0.5", "5"),
    ("cars", "car"),
    ("Is it 3?", "Is it 3!"),
]


def sketch(text):
    return sketches([text], [text.encode()])[0]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_question(one, other):
    assert question(one) == question(other)
    assert sketch(one) == sketch(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_questions(one, other):
    assert question(one) != question(other)


@given(st.text("aBz é1,0. \t\0+?", max_size=40), st.randoms())
def test_spacing_and_case_make_no_other_question(text, random):
    spaced = re.sub(r" +", lambda found: found[0] * random.randint(1, 3), text)
    written = "".join(random.choice([each.lower(), each.upper()]) for each in spaced)
    assert question(written) == question(text)


@given(st.text(st.characters(max_codepoint=255), max_size=30), st.text("aB 1é", max_size=5))
def test_texts_with_one_question_have_one_outline_and_one_sketch(one, other):
    for text in (one, one.lower(), one.swapcase(), f" {one} ", other):
        if question(text) == question(one):
            assert outline(text.encode()) == outline(one.encode())
            assert sketch(text) == sketch(one)


@given(st.sampled_from(["{} cars", "é {}", "{}"]), st.integers(0, 10**7), st.sampled_from(["", ".0", ".50", ".5"]))
def test_forms_of_a_number_have_one_sketch(words, number, part):
    texts = [words.format(form + part) for form in (f"{number}", f"{number:,}", f"00{number}")]
    assert len({question(text) for text in texts}) == len(set(map(sketch, texts))) == 1


def test_a_prompt_is_its_messages():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert prompt_text(messages) == "Be brief.\0Hi"
    assert question("ab\0c") != question("a\0bc")
