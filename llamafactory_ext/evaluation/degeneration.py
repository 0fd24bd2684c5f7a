"""Signs of degeneration in generated text: repetition, loops, and answers cut off at the token limit."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

# A text is degenerate if it is empty, ends in a loop, or more than half of its 4-grams are repeated; ordinary worked
# solutions stay far below these limits.
MAX_SEQ_REP_4 = 0.5
MAX_PERIOD = 200
MIN_REPEATS = 4
MIN_LOOP = 40  # characters


@dataclass(frozen=True)
class Degeneration:
    """The signs in one answer.

    Args:
        seq_rep_4: share of token 4-grams that occurred before in the text (arXiv 1908.04319), from 0 to 1.
        zlib_ratio: bytes of the text per byte when compressed with zlib; ordinary prose has 1 to 3.
        loop: whether the text ends with a passage of up to 200 characters repeated at least 4 times.
        cut_off: whether generation ended at the token limit.
        empty: whether there is no text.
    """

    seq_rep_4: float
    zlib_ratio: float
    loop: bool
    cut_off: bool
    empty: bool

    @property
    def degenerate(self) -> bool:
        """Whether the text is empty, ends in a loop, or repeats more than half of its 4-grams."""
        return self.empty or self.loop or self.seq_rep_4 > MAX_SEQ_REP_4

    def as_dict(self) -> dict[str, float | bool]:
        """The signs by name, with `degenerate`."""
        return {**asdict(self), "degenerate": self.degenerate}


def inspect_output(
    text: str, tokens: Sequence[Hashable] | None = None, finish_reason: str | None = None
) -> Degeneration:
    """Look for all signs in one answer; without token ids, words count as tokens."""
    return Degeneration(
        seq_rep_4=seq_rep(text.split() if tokens is None else tokens, 4),
        zlib_ratio=zlib_ratio(text),
        loop=ends_in_loop(text),
        cut_off=finish_reason == "length",
        empty=not text.strip(),
    )


def is_degenerate(text: str) -> bool:
    """Whether a text is empty, ends in a loop, or repeats more than half of its 4-grams of words."""
    return inspect_output(text).degenerate


def seq_rep(tokens: Sequence[Hashable], n: int) -> float:
    """1 - (number of distinct n-grams) / (number of n-grams); 0 for a text shorter than n."""
    count = len(tokens) - n + 1
    return 1 - len(set(zip(*(tokens[i:] for i in range(n)), strict=False))) / count if count > 0 else 0.0


def zlib_ratio(text: str) -> float:
    """Bytes of the text per compressed byte; 0 for an empty text."""
    raw = text.encode("utf-8", errors="surrogatepass")
    return len(raw) / len(zlib.compress(raw)) if raw else 0.0


def ends_in_loop(text: str) -> bool:
    """Whether the text ends with a passage of at most `MAX_PERIOD` characters repeated `MIN_REPEATS` times."""
    return _is_loop(text) or _is_loop(text.rstrip())


def _is_loop(text: str) -> bool:
    for period in range(1, MAX_PERIOD + 1):
        length = max(MIN_REPEATS * period, MIN_LOOP)
        if length > len(text):
            return False
        if text[-length:-period] == text[period - length :]:
            return True
    return False
