"""How far memory rises while layers run forward and back, by how many tokens they run over.

Between two lengths that were measured the rise lies on the line between theirs or below it, as it is the largest of
some that grow evenly; below the shortest it is taken to be as large, and beyond the longest to be in proportion.
"""

from __future__ import annotations

# a forward that is so many times as long as all that were measured is measured itself
LONGER = 1.2


class Rise:
    def __init__(self) -> None:
        # tokens -> bytes
        self._measured: dict[int, int] = {}

    def measured(self, tokens: int, rise: int) -> None:
        """The largest of several over as many tokens counts."""
        self._measured[tokens] = max(rise, self._measured.get(tokens, 0))

    def covers(self, tokens: int) -> bool:
        """Whether forwards were measured of which this one's rise can be told."""
        return tokens <= LONGER * max(self._measured, default=-1)

    def of(self, tokens: int) -> float:
        """In bytes, where at least one forward was measured."""
        longer = min((known for known in self._measured if known >= tokens), default=None)
        shorter = max((known for known in self._measured if known < tokens), default=None)
        if longer is None:
            return self._measured[shorter] * tokens / shorter
        if shorter is None:
            return self._measured[longer]
        share = (tokens - shorter) / (longer - shorter)
        return self._measured[shorter] + share * (self._measured[longer] - self._measured[shorter])
