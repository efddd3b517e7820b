"""How long to wait before the next try."""

from collections.abc import Iterator
from random import uniform


def backoff(first: float, ceiling: float) -> Iterator[float]:
    """Delays in seconds that double up to a ceiling, with full jitter: after an outage nobody returns in step with others."""
    while True:
        yield uniform(0, first)
        first = min(2 * first, ceiling)
