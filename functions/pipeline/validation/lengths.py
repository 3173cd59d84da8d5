"""How long things are: a distribution kept as counts, which take no more memory for more rows."""

from collections import Counter
from math import ceil


def summary(lengths: Counter[int]) -> dict[str, float]:
    """Return minimum, mean, percentiles and maximum of lengths that are counted (`{length: how often}`)."""
    total = lengths.total()
    found, seen = {}, 0
    wanted = {"min": 1, "p50": ceil(total * 0.5), "p95": ceil(total * 0.95), "p99": ceil(total * 0.99), "max": total}
    ordered = iter(sorted(lengths.items()))
    length = 0
    for name, rank in wanted.items():
        while seen < rank:
            length, count = next(ordered)
            seen += count
        found[name] = float(length)
    found["mean"] = round(sum(length * count for length, count in lengths.items()) / total, 1)
    return found
