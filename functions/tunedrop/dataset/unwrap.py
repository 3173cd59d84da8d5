"""Takes apart a JSON file that is one object with all rows in it.

Such files come from web services (`{"data": [...]}`), the Hub's dataset server (`rows[].row`), `DatasetDict` (names of
splits), and pandas' `to_json` with its orientations columns, index, split and table
(https://pandas.pydata.org/docs/reference/api/pandas.DataFrame.to_json.html).
"""

from typing import Any, NamedTuple

SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")


class Unwrapped(NamedTuple):
    """The rows of a wrapper, and a sentence that says where they were."""

    rows: list[Any]
    note: str


def unwrap(value: dict[str, Any]) -> Unwrapped | None:
    """Return the rows in an object, None if the object is a row itself."""
    return _lists(value) or _pandas(value)


def _are_rows(value: Any) -> bool:
    """Whether a value is a list of objects that are no messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) for each in value)
        and not ({"role", "from"} & value[0].keys() or {"type", "function"} <= value[0].keys())
    )


def _lists(value: dict[str, Any]) -> Unwrapped | None:
    """Return the rows of the only list of objects, or of the training split."""
    lists = {name: each for name, each in value.items() if _are_rows(each)}
    if {"question", "prompt", "messages", "conversations", "instruction"} & value.keys():
        return None
    if len(lists) > 1 and all(name.casefold() in SPLITS for name in lists):
        name = next((name for name in lists if name.casefold().startswith("train")), "")
        if not name:
            return None
        others = ", ".join(f"{other} ({len(rows)} rows)" for other, rows in lists.items() if other != name)
        return Unwrapped(lists[name], f"the rows are those of '{name}' in the file's object; not read: {others}")
    if "rows" in lists and all(isinstance(each.get("row"), dict) for each in lists["rows"]):
        return Unwrapped(
            [each["row"] for each in lists["rows"]], "the rows are those of 'rows' in the file's object, each in 'row'"
        )
    if len(lists) == 1 or (len(lists) > 1 and "data" in lists):  # pandas' table has 'schema' beside 'data'
        name = "data" if "data" in lists else next(iter(lists))
        return Unwrapped(lists[name], f"the rows are those of '{name}' in the file's object")
    return None


def _pandas(value: dict[str, Any]) -> Unwrapped | None:
    """Return the rows of a table by columns (lists or objects), by index, or split into columns and data."""
    if {"columns", "data"} <= value.keys() and isinstance(value["columns"], list) and isinstance(value["data"], list):
        rows = [dict(zip(map(str, value["columns"]), row, strict=False)) for row in value["data"] if isinstance(row, list)]
        return Unwrapped(rows, "the file is a table in pandas' orientation 'split'") if rows else None
    parts = list(value.values())
    if len(parts) > 1 and all(isinstance(part, list) for part in parts) and len({len(part) for part in parts}) == 1:
        if len(parts[0]) < 2 or all(isinstance(part[0], dict) for part in parts):
            return None
        rows = [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
        return Unwrapped(rows, "the file is one object with a list for each column")
    if (
        len(parts) < 2
        or not all(isinstance(part, dict) and part.keys() == parts[0].keys() for part in parts)
        or not parts[0]
    ):
        return None
    if all(key.isdecimal() for key in parts[0]):
        rows = [dict(zip(value, row, strict=True)) for row in zip(*(part.values() for part in parts), strict=True)]
        return Unwrapped(rows, "the file is a table in pandas' orientation 'columns'")
    rows = [{"id": key} | part for key, part in value.items()]
    return Unwrapped(rows, "the file is one object with a row for each key")
