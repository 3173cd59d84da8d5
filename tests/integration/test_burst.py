"""A burst of uploads, small: see benchmarks/burst.py for the large one and its figures."""

from benchmarks.burst import DYNAMODB, S3, burst


def test_a_burst_loses_nothing_does_nothing_twice_and_costs_the_same_per_run():
    few, more = burst(3, 1, jobs=1), burst(12, 2, jobs=1)  # each checks that all runs are published once
    for operations in (DYNAMODB, S3):
        assert more.per_run(operations) < 1.2 * few.per_run(operations)
