"""Token bytes to text for a client: whole characters only, and nothing of a stop string. Pure."""

from __future__ import annotations

import codecs


class TextAssembler:
    """Feeds on bytes and gives out text as soon as it cannot change any more.

    Held back are an unfinished UTF-8 sequence and a tail that may be the beginning of a stop
    string. Bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """Text that is now certain; ``stopped`` is set when a stop string was completed."""
        return self._advance(self._decoder.decode(data))

    def flush(self) -> str:
        """The rest, at the end of the generation."""
        text = self._advance(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _advance(self, text: str) -> str:
        if not self._stops:
            return text
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            result, self._held = self._held[: min(found)], ""
            return result
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        result, self._held = self._held[:cut], self._held[cut:]
        return result

    def _overlap(self, stop: str) -> int:
        """Length of the longest tail of what is held that begins ``stop``."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
