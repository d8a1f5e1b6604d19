"""When to try again: pure."""


def wait_seconds(attempts: int, first: float, longest: float, jitter: float) -> float:
    """Seconds until the next attempt: doubles from first up to longest.

    attempts: made so far, at least 1; jitter: 0 to 1, spreads senders over +-10 %
    """
    doubled = first * 2.0 ** min(attempts - 1, 60)
    return min(doubled, longest) * (0.9 + 0.2 * jitter)
