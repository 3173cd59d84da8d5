"""Cases of every reward: its parameters, a completion, the row's answer, and the score (None: the reward abstains)."""

import json
from typing import Any

XML = "<reasoning>\n2 and 2\n</reasoning>\n<answer>\n4\n</answer>"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
CALL = {"name": "weather", "arguments": {"city": "Rome", "days": 2}}
CHECK = {"type": "string_check", "name": "c", "input": "{{sample.output_text}}", "reference": "{{item.reference_answer}}"}
SIMILAR = {"type": "text_similarity", "name": "s", "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}"}


def grader(**given):
    return {"grader": (CHECK if "operation" in given else SIMILAR) | given}


CASES: dict[str, list[tuple[dict[str, Any], str, str, float | None]]] = {
    "exact_match": [
        ({}, "Paris", "paris", 1.0),
        ({}, "  **Paris.** ", "Paris", 1.0),
        ({}, XML, "4", 1.0),
        ({}, "<think>5</think> 4", "4", 1.0),
        ({}, "8 legs\n#### 8", "2 cats have 8 legs.\n#### 8", 1.0),
        ({}, "so \\boxed{8}", "<think>2 * 4</think><answer>8</answer>", 1.0),
        ({}, "8", "it is 9\n#### 9", 0.0),
        ({}, "The answer is 4", "4", 0.0),
        ({}, "ﬁne", "fine", 1.0),
        ({"normalize": False}, "paris", "Paris", 0.0),
    ],
    "numeric": [
        ({}, "2 + 2 is 4.", "4", 1.0),
        ({}, "It costs 1,234.50 dollars", "1234.5", 1.0),
        ({}, "about -3", "-3.0", 1.0),
        ({}, "none", "4", 0.0),
        ({"tolerance": 0.1}, "3.05", "3", 1.0),
        ({"relative": 0.1}, "105", "100", 1.0),
        ({"relative": 0.1}, "111", "100", 0.0),
        ({}, "4", "four", None),
    ],
    "math": [
        ({}, r"So it is \boxed{\frac{1}{2}}", "0.5", 1.0),
        ({}, "<answer>1/2</answer>", r"\frac{1}{2}", 1.0),
        ({}, "$2x + x$", "$3x$", 1.0),
        ({}, r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1.0),
        ({}, r"\boxed{3}", "0.5", 0.0),
        ({}, "no idea", "0.5", 0.0),
        ({}, "4", "", None),
    ],
    "multiple_choice": [
        ({}, "B", "b", 1.0),
        ({}, "The answer is (C).", "C", 1.0),
        ({}, "Answer: B\nNo wait, the answer is D", "D", 1.0),
        ({}, r"\boxed{\text{B}}", "B. Paris", 1.0),
        ({}, "<answer>A) Rome</answer>", "(A)", 1.0),
        ({}, "A cat sat on the mat", "A", 0.0),
        ({}, "So the answer is a cat", "A", 0.0),
        ({}, "so the answer is a.", "A", 1.0),
        ({}, "E", "E", None),
        ({"choices": "ABCDE"}, "E", "E", 1.0),
        ({}, "B", "Paris", None),
    ],
    "contains": [
        ({}, "It is PARIS, of course", "Paris", 1.0),
        ({"ignore_case": False}, "It is PARIS", "Paris", 0.0),
        ({"text": "because"}, "Paris because I say so", "London", 1.0),
    ],
    "regex": [
        ({"pattern": r"\d{2}"}, "I am 42", "", 1.0),
        ({"pattern": r"\d{2}", "full": True}, "I am 42", "", 0.0),
    ],
    "xml_format": [
        ({}, XML, "", 1.0),
        ({}, "<reasoning>a</reasoning><answer></answer>", "", 0.0),
        ({}, XML + " and more", "", 0.0),
        ({}, "<answer>4</answer><reasoning>a</reasoning>", "", 0.0),
        ({}, "<reasoning>a<reasoning></reasoning><answer>4</answer>", "", 0.0),
        ({"mode": "soft"}, f"Sure. {XML} Done.", "", 1.0),
        ({"mode": "soft"}, "<answer>4</answer><reasoning>a</reasoning>", "", 0.0),
        ({"mode": "soft"}, "<reasoning>a</reasoning> so <answer> </answer>", "", 0.0),
        ({"mode": "partial"}, "<reasoning>a</reasoning> 4", "", 0.5),
        ({"mode": "partial"}, XML, "", 1.0),
        ({"mode": "partial"}, XML + "<answer>", "", 0.75),
        ({"tags": ["plan"]}, "<plan>x</plan>", "", 1.0),
    ],
    "think_format": [
        ({}, "<think>hm</think>\n4", "", 1.0),
        ({}, "<think>hm</think>", "", 0.0),
        ({}, "<think>a<think>b</think> 4", "", 0.0),
        ({}, "hm</think> 4", "", 0.0),
        ({}, "4", "", 0.0),
        ({"mode": "soft"}, "hm</think> 4", "", 1.0),
        ({"mode": "soft"}, "a <think>hm</think> 4", "", 0.0),
        ({"mode": "partial"}, "<think>hm</think>", "", 2 / 3),
        ({"mode": "partial"}, "4", "", 0.0),
    ],
    "length": [
        ({"maximum": 4}, "one two three", "", 1.0),
        ({"maximum": 2}, "one two three", "", 0.5),
        ({"maximum": 1}, "one two three", "", 0.0),
        ({"minimum": 4}, "one two", "", 0.5),
        ({"maximum": 3, "unit": "characters"}, "abc", "", 1.0),
    ],
    "overlong_penalty": [
        ({"maximum": 4, "buffer": 2}, "one two", "", 0.0),
        ({"maximum": 4, "buffer": 2}, "one two three", "", -0.5),
        ({"maximum": 4, "buffer": 2}, "a b c d e f g", "", -1.0),
    ],
    "repetition_penalty": [
        ({}, "one two three four", "", 0.0),
        ({"ngram": 2}, "a a a a a", "", -0.75),  # the example of TRL's own reward
        ({"ngram": 1, "max_penalty": -2.0}, "ha ha", "", -1.0),
        ({}, "", "", 0.0),
    ],
    "similarity": [
        ({}, "Paris", "paris", 1.0),
        ({}, "kitten", "sitting", 2 * 4 / 13),
        ({"method": "token_sort"}, "world hello", "hello world", 1.0),
        ({"method": "token_set"}, "hello big world", "hello world", 1.0),
        ({"method": "partial"}, "well, Paris it is", "paris", 1.0),
        ({"method": "weighted"}, "", "paris", 0.0),
    ],
    "rouge": [
        ({}, "the cat sat", "the cat sat", 1.0),
        ({}, "police kill the gunman", "police killed the gunman", 0.75),  # Lin (2004), section 3.1
        ({}, "the gunman kill police", "police killed the gunman", 0.5),
        ({"variant": "1"}, "b a", "a b c d", 2 / 3),
        ({"variant": "2", "measure": "recall"}, "a b c", "a b x c", 1 / 3),
        ({"measure": "precision"}, "a b", "a b c d", 1.0),
        ({}, "", "a", 0.0),
    ],
    "relevance": [
        ({}, "red cars are fast", "red cars", 1.0),
        ({}, "blue", "red cars", 0.0),
        ({}, "red", "red cars", 0.5),
        ({}, "anything", "the of", None),
    ],
    "keywords": [
        ({"terms": ["red", "c++"]}, "Red, and C++.", "", 1.0),
        ({"terms": ["car", "red"]}, "red cars", "", 0.5),
        ({"terms": []}, "red cars", "", None),
    ],
    "citations": [
        ({}, "So it is [1].", "", 1.0),
        ({"minimum": 4}, "So [1, 2].", "", 0.5),
        ({}, "So it is.", "", 0.0),
    ],
    "quotes": [
        ({"minimum_words": 2}, 'As asked: "how many cars", yes', "", 1.0),
        ({"minimum_words": 2}, '"how many cars" and “never said so”', "", 0.5),
        ({}, "nothing", "", 0.0),
    ],
    "json_valid": [
        ({}, '```json\n{"a": 1}\n```', "", 1.0),
        ({}, "null", "", 1.0),
        ({}, '{"a": NaN}', "", 0.0),
        ({}, "[" * 100_000, "", 0.0),
        ({}, '{"a": 1} and more', "", 0.0),
        ({"kind": "object"}, "[1]", "", 0.0),
    ],
    "json_schema": [
        ({"schema": PERSON}, '{"name": "Ada", "age": 36}', "", 1.0),
        ({"schema": PERSON}, '{"name": "Ada"}', "", 0.0),
        ({"schema": PERSON, "partial": True}, '{"name": "Ada"}', "", 0.5),
        ({"schema": PERSON, "partial": True}, "[]", "", 0.2),
        ({"schema": PERSON, "partial": True}, "Ada", "", 0.0),
        ({}, '{"name": "Ada", "age": 36}', json.dumps(PERSON), 1.0),
    ],
    "json_match": [
        ({}, '{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 1.0),
        ({}, '```json\n{"a": 1, "b": 3}\n```', '{"a": 1, "b": 2}', 0.5),
        ({}, '{"a": 1, "b": 2, "c": 3}', '{"a": 1, "b": 2}', 2 / 3),
        ({"partial": False}, '{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 0.0),
        ({}, "[1, 2]", "[1, 2]", 1.0),
        ({}, "[2, 1]", "[1, 2]", 0.0),
        ({}, "none", '{"a": 1}', 0.0),
        ({}, '{"a": 1}', "none", None),
    ],
    "tool_call": [
        ({}, json.dumps(CALL), json.dumps(CALL), 1.0),
        ({}, f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", json.dumps([CALL]), 1.0),
        ({}, json.dumps(CALL | {"arguments": {"city": "Rome"}}), json.dumps(CALL), 0.75),
        ({"partial": False}, json.dumps(CALL | {"arguments": {"city": "Rome"}}), json.dumps(CALL), 0.0),
        ({}, json.dumps([CALL, CALL]), json.dumps(CALL), 0.5),
        ({}, json.dumps({"function": {"name": "weather", "arguments": "{}"}}), json.dumps(CALL), 0.5),
        ({}, json.dumps({"name": "news", "arguments": {}}), json.dumps(CALL), 0.0),
        ({}, "I would look out of the window", json.dumps(CALL), 0.0),
    ],
    "openai_grader": [
        (grader(operation="eq"), "yes", "yes", 1.0),
        (grader(operation="ne"), "yes", "yes", 0.0),
        (grader(operation="like"), "oh Yes", "yes", 0.0),
        (grader(operation="ilike"), "oh Yes", "yes", 1.0),
        (grader(operation="eq", input="{{sample.output_json.a.b}}"), '{"a": {"b": 3}}', "3", 1.0),
        (grader(evaluation_metric="fuzzy_match"), "paris", "paris", 1.0),
        (grader(evaluation_metric="rouge_2"), "a b c", "a b d", 0.5),
        (grader(evaluation_metric="rouge_l"), "a b c", "a b c", 1.0),
        (grader(evaluation_metric="gleu"), "a b", "a b c d", 3 / 10),
        (
            {
                "grader": {
                    "type": "multi",
                    "graders": {"a": CHECK | {"operation": "eq"}, "b": SIMILAR | {"evaluation_metric": "rouge_1"}},
                    "calculate_output": "min(1, 0.5 * a + b ^ 2) / 2",
                }
            },
            "x",
            "x",
            0.5,
        ),
    ],
    "code_tests": [
        ({"tests": ["assert x == 1", "assert y == 2"]}, "x = 1\ny = 3", "", 0.5),
        ({}, "x = 1", "assert x == 1", 1.0),
    ],
    # The service, the model and the file of these cases are in test_rewards.py. They compare with the answer.
    "lambda": [
        ({"function_arn": "score"}, "Paris", "Paris", 1.0),
        ({"function_arn": "score", "request": "batch"}, "Rome", "Paris", 0.0),
    ],
    "http": [({"url": "https://rewards.example.com"}, "Paris", "Paris", 1.0)],
    "judge": [
        ({"model": "grader"}, "Paris", "Paris", 1.0),
        ({"model": "grader", "scale": [-10, 30]}, "Rome", "Paris", 0.25),
    ],
    "judge_group": [
        ({"model": "grader"}, "Paris", "Paris", 0.5),
        ({"model": "grader"}, "Rome", "Paris", 0.0),
    ],
    "python": [({"file": "own.py"}, "Paris", "Paris", 1.0), ({"file": "own.py", "function": "half"}, "Rome", "Paris", 0.5)],
}
