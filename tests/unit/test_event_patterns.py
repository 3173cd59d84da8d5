"""The complexity of rules has the values of event-ruler's tests, and agrees with EventBridge's observed refusals."""

import itertools

import pytest

from local_app.aws.event_patterns import _of_field, complexity

# https://github.com/aws/event-ruler/blob/main/src/test/software/amazon/event/ruler/MachineComplexityEvaluatorTest.java
PUBLISHED = [
    (1, "*"),
    (3, "*", "ab*c"),
    (1, "abc"),
    (2, "*ab"),
    (3, "*aa"),
    (2, "a*b"),
    (2, "aa*"),
    (2, "a*bc"),
    (3, "a*bb"),
    (3, "a*bcb"),
    (4, "a*bbb"),
    (4, "*ab*ad"),
    (3, "*ab*d"),
    (4, "*aba*"),
    (5, "a*b*bb"),
    (4, "a*b*cb"),
    (3, "a*b*cd"),
    (4, "a*b*b"),
    (4, "a*bb*"),
    (3, "ab*b*"),
    (3, "ab*c", "x*xx"),
    (4, "*abc", "*abcde"),
    (4, "a*bcd", "ab*cd"),
    (4, "a*bc", "a*bcde"),
    (7, "a*aaa", "aa*aa"),
    (4, "a*bc", "abc*d"),
    (6, "a*aaa", "aaa*a"),
    (5, "a*aax", "aaa*x"),
    (4, "a*bc", "abc*"),
    (5, "a*aa", "aaa*"),
    (3, "abc*", "abcde*"),
    (6, "ab*cd", "ab*wx", "ab*yz"),
    (7, "*ab*b*b*"),
    (17, "*a*a*a*a*a*a*a*a*"),
    (10, "F*eatureFeature", "Fe*atureFeature", "Fea*tureFeature"),
]


@pytest.mark.parametrize(("value", "patterns"), [(value, patterns) for value, *patterns in PUBLISHED])
def test_the_values_that_event_ruler_publishes(value, patterns):
    for permutation in itertools.permutations(patterns):
        assert _of_field(frozenset(permutation)) == value


def test_the_rule_that_event_ruler_publishes():
    """Prefixes, suffixes and exact values add nothing; the most complex field counts."""
    others = [{"prefix": "a"}, "abcdef", {"suffix": "z"}]
    wild = [{"prefix": "b"}, {"wildcard": "a*a*a*a*a*a*"}, {"suffix": "c"}]
    assert complexity({"abc": others, "def": wild, "ghi": others}) == 11


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        ({"source": ["aws.s3"], "detail": {"object": {"key": [{"prefix": "training_data/"}]}}}, 0),
        ({"detail": {"a": [{"anything-but": {"wildcard": "*/bin/*"}}]}}, complexity({"a": [{"wildcard": "*/bin/*"}]})),
        ({"detail": {"a": [{"wildcard": ["x*", "y*"]}]}}, complexity({"a": [{"wildcard": "x*"}, {"wildcard": "y*"}]})),
        ({"$or": [{"a": ["x"]}, {"a": [{"wildcard": "*"}]}]}, complexity({"a": [{"wildcard": "*"}]})),
        ({"a": [{"wildcard": "a\\*b"}]}, 1),  # an escaped star is a letter
        ({"a": [{"wildcard": "*" + "a*" * 60}]}, 100),
    ],
)
def test_where_wildcards_are(pattern, value):
    assert complexity(pattern) == value


def test_a_rule_that_eventbridge_refused():
    """Eight wildcards of this shape were refused, six accepted (https://github.com/vals-ai/Valkyrie/pull/278)."""

    def of(*names):
        return complexity({"detail": {"stack-id": [{"wildcard": f"*:stack/{name}/*"} for name in names]}})

    assert of("SharedStack", "DataStack", "ComputeStack") <= 10 < of("SharedStack", "DataStack", "ComputeStack", "SiteStack")
