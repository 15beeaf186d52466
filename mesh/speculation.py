"""Prompt lookup: what a session's next tokens may be, by what followed the same words before. Pure.

A guess costs a longer step and pays with the tokens that turn out right; steps over slow links cost little more for
being longer. So both are measured, for each session: what a single step takes, what each guess adds, and how many of
the guesses after a match of one to four tokens come true. As many are made as give the most tokens a second,
which may be none. With guesses that come true with probability ``a`` each, a step of ``k`` of them gives
``1 + a + ... + a**k`` tokens (Leviathan et al., https://arxiv.org/abs/2211.17192, equation 1).
"""

from __future__ import annotations

from collections.abc import Iterable

GUESSES_MAX = 15
"""With the token before them they fill the chunk that runtimes have for short runs."""
_MATCHES = (4, 3, 2, 1)
_HOPE = {4: 0.8, 3: 0.7, 2: 0.5, 1: 0.3}
"""How often a guess is taken to come true before any was made, by the length of the match."""
_HOPE_WEIGHT = 2.0
_KEPT = 0.9
"""Of what earlier guesses told, each time one more is made."""
_FADES = 0.995
"""As much is left of it after a step without guesses: what does not pay is tried again in the end."""
_SMOOTHING = 0.2
_EXTRA_UNKNOWN = 0.05
"""Of a single step, for each guess, until one was measured."""
_LEAST_GAIN = 1.05
_STEP_MAX = 4.0
"""A step that took more of what is usual was held up by something else."""


class Speculation:
    """The guesses of one session. All times are nanoseconds of one clock."""

    def __init__(self, history: Iterable[int]) -> None:
        """``history``: the prompt, and what was generated before."""
        self._history: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """Where the words that follow stand, of the last time that these stood there."""
        self._guesses: tuple[int, ...] = ()
        self._right = 0
        self._match = 0
        self._fed_ns: int | None = None
        self._single_ns = self._extra_ns = 0.0
        self._doubted = False
        """The first step with guesses took long, and was not believed."""
        self._came = {n: (_HOPE_WEIGHT * hope, _HOPE_WEIGHT) for n, hope in _HOPE.items()}
        """Guesses that came true and that were put to the test, by match; earlier ones count less."""
        self.made = self.right = 0
        """Guesses, and those that came true."""
        for token in history:
            self._append(token)

    def guess(self, room: int, now: int) -> tuple[int, ...]:
        """Tokens to try after the last, at most ``room``; the step begins ``now``."""
        self._guesses, self._right, self._fed_ns = (), 0, now
        start, self._match = self._lookup()
        if self._single_ns and start:
            count = self._best(min(room, GUESSES_MAX), self._chance(self._match))
            self._guesses = self._continuation(start, count)
        self.made += len(self._guesses)
        return self._guesses

    def take(self, token: int, now: int) -> bool:
        """A token came; whether another one of this step is to come."""
        self._append(token)
        if self._right < len(self._guesses) and self._guesses[self._right] == token:
            self._right += 1
            self.right += 1
            return True
        if self._fed_ns is not None:
            self._measure(now - self._fed_ns)
        self.forget()
        return False

    def forget(self) -> None:
        """The step that is under way, if any, is lost."""
        self._guesses, self._right, self._fed_ns = (), 0, None

    def _append(self, token: int) -> None:
        history = self._history
        for n in _MATCHES:
            if len(history) >= n:
                self._after[tuple(history[-n:])] = len(history)
        history.append(token)

    def _lookup(self) -> tuple[int, int]:
        """Where the continuation of the last words stands, and how many of them stand before it; 0, 0: nowhere."""
        for n in _MATCHES:
            start = self._after.get(tuple(self._history[-n:])) if len(self._history) >= n else None
            if start is not None:
                return start, n
        return 0, 0

    def _continuation(self, start: int, count: int) -> tuple[int, ...]:
        """``count`` tokens from there on; past the end what was guessed goes round."""
        guessed: list[int] = []
        for at in range(start, start + count):
            known = len(self._history)
            guessed.append(self._history[at] if at < known else guessed[at - known])
        return tuple(guessed)

    def _chance(self, match: int) -> float:
        came, tried = self._came[match]
        return came / tried

    def _best(self, most: int, chance: float) -> int:
        """How many guesses give the most tokens a second; 0 where a single step does."""
        extra = self._extra_ns or _EXTRA_UNKNOWN * self._single_ns
        best, best_rate = 0, _LEAST_GAIN / self._single_ns
        tokens, likely = 1.0, 1.0
        for count in range(1, most + 1):
            likely *= chance
            tokens += likely
            rate = tokens / (self._single_ns + count * extra)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def _measure(self, took: float) -> None:
        count = len(self._guesses)
        if not count:
            usual = self._single_ns
            self._single_ns = usual + _SMOOTHING * (min(took, _STEP_MAX * usual) - usual) if usual else took
            self._came = {n: self._faded(n) for n in _MATCHES}
            return
        extra = max(0.0, min(took, _STEP_MAX * self._single_ns) - self._single_ns) / count
        if not self._extra_ns and not self._doubted and extra > _EXTRA_UNKNOWN * self._single_ns:
            self._doubted = True  # what comes once may be in it, as a graph's first run: the next one decides
        else:
            # Never nothing at all: 0 says that it is not known.
            weight = _SMOOTHING if self._extra_ns else 1.0
            self._extra_ns += weight * (max(extra, 1.0) - self._extra_ns)
        came, tried = self._came[self._match]
        tested = min(self._right + 1, count)
        self._came[self._match] = (_KEPT * came + self._right, _KEPT * tried + tested)

    def _faded(self, match: int) -> tuple[float, float]:
        """Less sure of what was seen, and so nearer to what was hoped."""
        came, tried = self._came[match]
        hope = _HOPE_WEIGHT * _HOPE[match]
        return hope + _FADES * (came - hope), _HOPE_WEIGHT + _FADES * (tried - _HOPE_WEIGHT)
