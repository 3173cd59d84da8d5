"""Distributions of lengths, kept as counts: more rows take no more memory."""

from collections import Counter
from math import ceil


def summary(lengths: Counter[int]) -> dict[str, float]:
    """Return minimum, percentiles, maximum and mean of lengths, given as `{length: count}`."""
    total = lengths.total()
    result, seen = {}, 0
    ranks = {"min": 1, "p50": ceil(total * 0.5), "p95": ceil(total * 0.95), "p99": ceil(total * 0.99), "max": total}
    ordered = iter(sorted(lengths.items()))
    length = 0
    for name, rank in ranks.items():
        while seen < rank:
            length, count = next(ordered)
            seen += count
        result[name] = float(length)
    result["mean"] = round(sum(length * count for length, count in lengths.items()) / total, 1)
    return result
