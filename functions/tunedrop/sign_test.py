"""The exact sign test of paired outcomes."""


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p-value of equally likely wins and losses; ties do not count.

    For pass-or-fail scores this is McNemar's exact test.
    """
    decided = wins + losses
    as_few, ways = 0, 1
    for k in range(min(wins, losses) + 1):
        as_few += ways
        ways = ways * (decided - k) // (k + 1)  # the next binomial coefficient
    return min(1.0, 2 * as_few / (1 << decided))
