"""Broken and hostile files, and what the receipt of each must say."""

import gzip
import io
import json
from collections.abc import Callable
from typing import NamedTuple

GOOD = b"".join(b'{"question": "%d+1?", "answer": "%d"}\n' % (n, n + 1) for n in range(30))
CSV = b"question,answer\n" + b"".join(b"%d+1?,%d\n" % (n, n + 1) for n in range(30))
CONFIG_KEY, TESTS_KEY = "training_data/cars.yaml", "inference_test/cars.json"


class Case(NamedTuple):
    """A file, and the codes of the problems in its receipt: none where it can be used after all."""

    name: str
    suffix: str
    body: Callable[[], bytes]
    codes: frozenset[str]
    says: str = ""  # part of a message

    def __str__(self) -> str:
        return self.name


def case(name: str, suffix: str, body: bytes | Callable[[], bytes], *codes: str, says: str = "") -> Case:
    return Case(name, suffix, body if callable(body) else lambda: body, frozenset(codes), says)


def row(answer: str) -> bytes:
    """A row whose answer is this JSON."""
    return b'{"question": "a", "answer": %s}\n' % answer.encode()


def parquet(**columns: list[object]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def good_parquet() -> bytes:
    return parquet(question=[f"{n}+1?" for n in range(30)], answer=[str(n + 1) for n in range(30)])


def parquet_bomb(rows: int = 2_000_000, size: int = 1000) -> bytes:
    """A few kilobytes that unpack to `rows` times `size` bytes: one value, repeated."""
    import pyarrow
    from pyarrow import parquet

    index = pyarrow.repeat(pyarrow.scalar(0, pyarrow.int32()), rows)
    column = pyarrow.DictionaryArray.from_arrays(index, ["x" * size])
    out = io.BytesIO()
    table = pyarrow.table({"question": column, "answer": column})
    parquet.write_table(table, out, row_group_size=rows, compression="zstd", write_statistics=False)
    return out.getvalue()


DATASETS = [
    # encodings
    case("a byte order mark", ".jsonl", b"\xef\xbb\xbf" + GOOD),
    case("UTF-16", ".jsonl", GOOD.decode().encode("utf-16"), "ENCODING", says="UTF-16"),
    case("UTF-16 CSV", ".csv", CSV.decode().encode("utf-16"), "ENCODING", says="UTF-16"),
    case("Latin-1", ".jsonl", GOOD + row('"caf\xe9"').decode().encode("latin-1"), "ENCODING", says="not UTF-8"),
    case("Latin-1 CSV", ".csv", CSV + b"a,caf\xe9\n", "ENCODING", says="not UTF-8"),
    case("a NUL byte", ".jsonl", GOOD + row('"a\0b"'), "BAD_JSON"),
    case("a NUL byte at the end of the file", ".jsonl", GOOD + b"\0", "NOT_AN_OBJECT"),
    case("an escaped NUL", ".jsonl", GOOD + row(r'"a\u0000b"')),
    case("a lone surrogate", ".jsonl", GOOD + row(r'"\ud800"'), "BAD_JSON"),
    # JSON
    case("a file that was cut off", ".jsonl", GOOD + b'{"question": "a", "ans', "BAD_JSON", says="never closed"),
    case("an array that was cut off", ".json", b"[" + b",".join(GOOD.splitlines()), "BAD_JSON", says="never closed"),
    case("NaN", ".jsonl", GOOD + row("NaN"), "BAD_JSON"),
    case("Infinity", ".jsonl", GOOD + row("-Infinity"), "BAD_JSON"),
    case("a number out of range", ".jsonl", GOOD + row("1e999999"), "BAD_JSON"),
    case("an integer of 5,000 digits", ".jsonl", GOOD + row("9" * 5000), "BAD_JSON"),
    case("an integer of 100 digits", ".jsonl", GOOD + row("9" * 100)),
    case(
        "an integer of 100 digits in a column of its own",
        ".jsonl",
        GOOD + b'{"question": "a", "answer": "b", "n": %s}\n' % (b"9" * 100),
    ),
    case("100,000 levels of arrays", ".jsonl", GOOD + row("[" * 100_000 + "]" * 100_000), "BAD_JSON", says="nested too"),
    case("100,000 levels of objects", ".jsonl", GOOD + row('{"a":' * 100_000 + "1" + "}" * 100_000), "BAD_JSON"),
    case("100,000 opening braces", ".jsonl", GOOD + b"{" * 100_000, "BAD_JSON", says="never closed"),
    case("100,000 opening brackets", ".json", b"[" * 100_000, "NOT_AN_OBJECT", "BAD_JSON"),
    case("a key twice: the last one counts", ".jsonl", GOOD + b'{"question": "a", "answer": "b", "answer": "c"}\n'),
    case("one line of 17 MiB", ".jsonl", lambda: GOOD + row(json.dumps("x" * 17 * 2**20)), "ROW_TOO_LARGE"),
    case("scalars", ".json", b"[1, 2, null]", "NOT_AN_OBJECT"),
    case("a text", ".jsonl", b"just some notes\n", "NOT_AN_OBJECT"),
    case("nothing", ".jsonl", b"", "NO_ROWS"),
    case("white space", ".json", b" \n\t\n", "NO_ROWS"),
    case("a byte order mark and nothing", ".jsonl", b"\xef\xbb\xbf", "NO_ROWS"),
    case("a pickle", ".jsonl", b"\x80\x04\x95cos\nsystem\n(S'touch /tmp/tunedrop-pwned'\ntR.", "NOT_AN_OBJECT", "ENCODING"),
    # texts that something else would take for its own
    case("template syntax", ".jsonl", GOOD + row(json.dumps("{{ 7 * 7 }}{% include 'x' %}${7*7}<%= 7 %>"))),
    case("HTML", ".jsonl", GOOD + row(json.dumps("</td><script>alert(1)</script><img src=x onerror=alert(1)>"))),
    case("a spreadsheet's formula", ".csv", CSV + b"=cmd|' /C calc'!A0,1\n"),
    case("a shell's commands", ".csv", CSV + b"$(touch /tmp/tunedrop-pwned),`id`\n"),
    # CSV
    case("a quote that is never closed", ".csv", CSV + b'"a,b\n', "BAD_CSV"),
    case("too many fields", ".csv", CSV + b"a,b,c\n", "BAD_CSV", says="3 fields"),
    case("two columns of one name", ".csv", b"question,answer,answer\na,b,c\n", "BAD_CSV"),
    case("a header alone", ".csv", b"question,answer\n", "NO_ROWS"),
    case("a field of 17 MiB", ".csv", lambda: CSV + b'"' + b"x" * 17 * 2**20 + b'",1\n', "BAD_CSV"),
    case("a million empty lines", ".csv", lambda: CSV + b"\n" * 1_000_001, "BAD_CSV", says="lines are empty"),
    case("a NUL byte in CSV", ".csv", CSV + b"a\0b,c\n"),
    case("100,000 columns", ".csv", b",".join(b"c%d" % n for n in range(100_000)) + b"\n" + b"," * 99_999, "NO_PROMPT"),
    # Parquet
    case("a good Parquet file", ".parquet", good_parquet),
    case("a Parquet file that was cut off", ".parquet", lambda: good_parquet()[:-100], "BAD_PARQUET"),
    case("a Parquet file with other bytes in it", ".parquet", lambda: _damaged(good_parquet()), "BAD_PARQUET"),
    case(
        "a Parquet file that makes its reader crash",
        ".parquet",
        lambda: good_parquet().replace(b"\x3c\x01\x05", b"\xff\x01\x05"),  # the length of its levels
        "BAD_PARQUET",
        says="the reader crashed",
    ),
    case(
        "Parquet values too large to unpack",
        ".parquet",
        lambda: parquet_bomb(64, 4_000_000),
        "BAD_PARQUET",
        says="exceeded its memory limit",
    ),
    case(
        "a Parquet file with a broken schema",
        ".parquet",
        lambda: good_parquet().replace(b"/////", b"!!!!!"),  # of the base64 of Arrow's schema
        "BAD_PARQUET",
        says="ARROW:schema",
    ),
    case("a Parquet file's magic alone", ".parquet", b"PAR1PAR1", "BAD_PARQUET"),
    case("no Parquet file", ".parquet", GOOD, "BAD_PARQUET"),
    case("Parquet without a prompt", ".parquet", lambda: parquet(a=[1, 2], b=[None, None]), "NO_PROMPT"),
    # gzip
    case("a good gzipped file", ".jsonl.gz", lambda: gzip.compress(GOOD)),
    case("a gzipped file that was cut off", ".jsonl.gz", lambda: gzip.compress(GOOD)[:-20], "BAD_GZIP"),
    case("no gzipped file", ".jsonl.gz", GOOD, "BAD_GZIP"),
]

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{last}'] * 10)}]\n" for last, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = [
    case("a billion laughs", ".yaml", LAUGHS.encode(), "CONFIG_SYNTAX", says="alias"),
    case(
        "a tag that runs a command",
        ".yaml",
        b'model: !!python/object/apply:os.system ["touch /tmp/tunedrop-pwned"]',
        "CONFIG_SYNTAX",
    ),
    case("a tag that makes an object", ".yaml", b"!!python/object:subprocess.Popen {}", "CONFIG_SYNTAX"),
    case("100,000 levels", ".yaml", b"[" * 100_000 + b"]" * 100_000, "CONFIG_SYNTAX"),
    case("a mapping that contains itself", ".yaml", b"lora: &a\n  target_modules: *a\n", "CONFIG_SYNTAX"),
    case("a list", ".yaml", b"- 1\n- 2\n", "CONFIG_SYNTAX"),
    case("binary", ".yaml", b"\x00\xff\xfe\x00", "CONFIG_SYNTAX"),
    case("UTF-16", ".yaml", "model: base".encode("utf-16"), "CONFIG_SYNTAX"),
    case("a NUL byte", ".yaml", b"model: a\0b", "CONFIG_SYNTAX"),
    case("two megabytes of keys", ".yaml", lambda: b"".join(b"k%d: 1\n" % n for n in range(200_000)), "CONFIG_SYNTAX"),
    case("a model outside its folder", ".yaml", b"model: ../training_data", "CONFIG_VALUE"),
    case("a model of the file system", ".yaml", b"model: /etc", "CONFIG_VALUE"),
    case("a key twice", ".yaml", b"model: base\nmodel: other\n", "CONFIG_SYNTAX"),
]
TESTS = [
    case("100,000 levels", ".json", b"[" * 100_000 + b"]" * 100_000, "TESTS_SYNTAX"),
    case("cut off", ".json", b'{"evaluations": [', "TESTS_SYNTAX"),
    case("UTF-16", ".json", '{"evaluations": []}'.encode("utf-16"), "TESTS_SYNTAX"),
    case(
        "two of one id",
        ".json",
        b'{"evaluations": [%s]}' % b",".join([b'{"id": "a", "prompt": "p", "description": "d"}'] * 2),
        "DUPLICATE_TEST",
    ),
    case("40 MB", ".json", lambda: b'{"evaluations": [' + b" " * 40_000_000 + b"]}", "TESTS_SYNTAX", says="larger than"),
]
# Keys, and whether each is a dataset.
KEYS = {
    "training_data/../models/base/cars.jsonl": True,
    "training_data/../../../../etc/cars.jsonl": True,
    "training_data//cars.jsonl": True,
    "training_data/..jsonl": False,  # hidden, as ".jsonl" is
    "training_data/a\nb\tc.jsonl": True,
    "training_data/$(touch /tmp/tunedrop-pwned).jsonl": True,
    "training_data/<script>alert(1)</script>.jsonl": True,
    "training_data/{{7*7}}.jsonl": True,
    "training_data/%2e%2e%2fcars.jsonl": True,
    "training_data/" + "long" * 250 + ".jsonl": True,
    "training_data/🚗.jsonl": True,
    "training_data/\u202elnosj.jsonl": True,
    "training_data/.jsonl": False,
    "/training_data/cars.jsonl": False,
    "other/training_data/cars.jsonl": False,
}
# Files of a base model beside config.json, tokenizer.json and model.safetensors, and what is said about each.
MODELS = [
    ("pytorch_model.bin", b"\x80\x04", "MODEL_RUNS_CODE"),
    ("optimizer.pt", b"\x80\x04", "MODEL_RUNS_CODE"),
    ("deep/weights.pkl", b"\x80\x04", "MODEL_RUNS_CODE"),
    ("config.json", b'{"auto_map": {"AutoModelForCausalLM": "evil.Model"}}', "MODEL_RUNS_CODE"),
    ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}', "MODEL_RUNS_CODE"),
    ("config.json", b"{", "MODEL_CONFIG"),
    ("config.json", b"[1]", "MODEL_CONFIG"),
    ("config.json", b"[" * 100_000, "MODEL_CONFIG"),
    ("config.json", b" " * 20_000_000, "MODEL_CONFIG"),
]


def _damaged(raw: bytes) -> bytes:
    half = len(raw) // 2
    return raw[:4] + b"\xff" * (half - 4) + raw[half:]
