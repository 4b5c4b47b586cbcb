"""The text of an answer as it grows, up to a text that ends it."""

from collections.abc import Sequence

from pagedkv.sims.serve.served_engine import Decoder


class TextStream:
    """Decodes tokens, and keeps back what may be the beginning of a stop text."""

    def __init__(self, decoder: Decoder, stop: Sequence[str], *, include_stop: bool = False) -> None:
        """End before the first of the texts `stop` that comes, or behind it."""
        self._decoder, self._stop, self._include_stop = decoder, stop, include_stop
        self._kept = ""
        self._keep = max(map(len, stop), default=1) - 1
        self.stopped_by: str | None = None
        """The stop text that came, if one did."""

    def push(self, tokens: Sequence[int], *, last: bool) -> str:
        """Return what can be shown now. Behind a stop text nothing is. O(new text × stop texts)."""
        if self.stopped_by is not None:
            return ""
        text = self._kept + self._decoder.push(tokens, last=last)
        found = min(((place, stop) for stop in self._stop if (place := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped_by = found[1]
            return text[: found[0] + len(found[1]) * self._include_stop]
        shown = len(text) if last else max(len(text) - self._keep, 0)
        self._kept = text[shown:]
        return text[:shown]
