"""What a fault did to the load, in figures."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.load import Attempt

SLOW_S = 0.5
"""Whoever waits longer for an answer noticed something."""
_AT_THE_END_S = 1.0


@dataclass(frozen=True)
class Outage:
    """Times are seconds after the fault began; None: it did not come to that while the fault lasted."""

    requests: int
    failed: int
    stall_s: float
    """The longest that any request took, be it answered or not."""
    recovered_s: float | None
    """From then on every request and every word was answered in time."""
    stale_s: float | None
    """Until then something was still sent to where nobody answers."""
    broken: int
    """Connections that were established and broke."""
    silence_s: float
    """The longest that a connection heard nothing, or that there was no way to have one."""
    errors: tuple[str, ...] = ()
    caught_up_s: float | None = None
    """Where agents have something to catch up with: until all had."""
    note: str = ""

    @property
    def sent(self) -> str:
        return f"{self.failed} of {self.requests}"


def outage(requests: Sequence[Attempt], words: Sequence[Attempt], began: float, mended: float) -> Outage:
    """Of the attempts that ended after the fault began; `mended` is when it was undone. What mending does to attempts is told by `failed` and `stall_s`."""
    seen = [attempt for attempt in requests if attempt.ended >= began]
    said = [attempt for attempt in words if attempt.ended >= began]
    bad = [
        attempt
        for attempt in (*seen, *said)
        if (attempt.error and attempt.ended <= mended) or min(attempt.ended, mended) - attempt.began > SLOW_S
    ]
    lasting = any(attempt.ended > mended - _AT_THE_END_S and attempt.error for attempt in bad)
    recovered = max((attempt.ended - began for attempt in bad), default=0.0)
    stale = max((attempt.began - began for attempt in bad), default=0.0)
    return Outage(
        requests=len(seen),
        failed=sum(bool(attempt.error) for attempt in seen),
        stall_s=max((attempt.took_s for attempt in seen), default=0.0),
        recovered_s=None if lasting else recovered,
        stale_s=None if lasting else max(0.0, stale),
        broken=_broken(said),
        silence_s=_silence(said),
        errors=tuple(sorted({attempt.error for attempt in (*seen, *said) if attempt.error})),
    )


def _broken(words: Sequence[Attempt]) -> int:
    """An error on a connection that had spoken before; the vain attempts that follow are not counted again."""
    count, broken = 0, set[int]()
    for word in words:
        if word.error and word.talk not in broken:
            count += 1
            broken.add(word.talk)
        elif not word.error:
            broken.discard(word.talk)
    return count


def _silence(words: Sequence[Attempt]) -> float:
    """The longest time between two good answers of one talk."""
    longest, heard = 0.0, dict[int, float]()
    for word in words:
        since = heard.setdefault(word.talk, word.began)
        longest = max(longest, word.ended - since)
        if not word.error:
            heard[word.talk] = word.ended
    return longest
