"""From tokens to text as they come: whole characters, no stop string, not even its beginning."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from os.path import commonprefix
from typing import Any

from llama_adapter.inference.choice import Choice

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no character yet."""
LONGEST_CHARACTER = 4
"""Tokens of one character at most: each of its bytes in UTF-8."""


@dataclass(eq=False)
class Written:
    """The text of one answer.

    Attributes:
        decode: token ids -> text.
        ends: tokens that end the answer and are not part of it.
        stops: strings that end it likewise.
        strip: whether white space at both ends is left out, as a chat's answer is shown.
        before: the tokens that the answer goes on from, where its text is to join theirs: of a text's first token some
            tokenizers leave out the blank that it begins with.
        text: what has been written so far; it never changes but at its end.
        tokens: how many were written, an end token among them.
        starts: where in the text each token begins, in characters, for tokens whose text is known; part of a character
            begins where the whole one does.
        reason: "stop" where it ended by itself, "length" until then.
    """

    decode: Callable[[Sequence[int]], str]
    ends: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    strip: bool = True
    before: Sequence[int] = ()
    text: str = ""
    tokens: int = 0
    reason: str = "length"
    starts: list[int] = field(default_factory=list)
    _ids: list[int] = field(init=False)
    _joins: int = field(init=False)
    _from: int = 0
    _known: str = ""
    _held: str = ""

    def __post_init__(self) -> None:
        self._ids = list(self.before[-LONGEST_CHARACTER:])
        self._joins = len(self._ids)
        self._from, self._known = self._last_character() or (len(self._ids), "")

    def add(self, choice: Choice) -> bool:
        """Read one more token; returns whether the answer has come to its end."""
        self.tokens += 1
        if choice.token in self.ends:
            self.reason = "stop"
            return True
        self._ids.append(choice.token)
        self._held += self._new_text()
        if self._cut():
            return True
        self._release(self._held[: len(self._held) - self._might_go_on()])
        return False

    def finish(self) -> str:
        """The whole text: nothing more comes."""
        self._held += self._new_text(last=True)
        self._cut()
        self._release(self._held)
        if self.strip:
            self._held = ""
        return self.text

    def _cut(self) -> bool:
        """End the answer before the first stop string, if one has come."""
        cut = min((at for stop in self.stops if (at := self._held.find(stop)) >= 0), default=None)
        if cut is None:
            return False
        self._held, self.reason = self._held[:cut], "stop"
        self._from, self._known = len(self._ids), ""
        return True

    def _release(self, sure: str) -> None:
        """Write what is sure; white space waits for what follows it where the ends are stripped."""
        self._held = self._held[len(sure) :]
        if self.strip:
            sure = sure if self.text else sure.lstrip()
            kept = sure.rstrip()
            self._held = sure[len(kept) :] + self._held
            sure = kept
        self.text += sure

    def _new_text(self, last: bool = False) -> str:
        """What the newest tokens add; decoded with the few before them, as some tokenizers join words."""
        whole = self.decode(self._ids[self._from :])
        if whole.endswith(INCOMPLETE) and not last:
            return ""
        new = whole[len(self._known) :]
        if new or last:
            self._find_starts(whole)
        if new:
            self._from, self._known = self._last_character() or (len(self._ids) - 1, self.decode(self._ids[-1:]))
        return new

    def _find_starts(self, whole: str) -> None:
        """Note where the tokens begin that `whole`, the text from `_from` on, was waiting for."""
        first = self._joins + len(self.starts)
        before = len(self.text) + len(self._held) - len(self._known)
        for place in range(first, len(self._ids)):
            text = self._known if place == first else self.decode(self._ids[self._from : place])
            self.starts.append(before + len(commonprefix([text, whole])))  # noqa: RUF071 - of characters

    def _last_character(self) -> tuple[int, str] | None:
        """Where the fewest last tokens that are whole characters begin, and their text; None where there are none.

        A character of several tokens stays whole: some tokenizers write a run of bytes as text or not at all.
        """
        starts = range(len(self._ids) - 1, max(self._from, len(self._ids) - LONGEST_CHARACTER) - 1, -1)
        decoded = ((start, self.decode(self._ids[start:])) for start in starts)
        return next((found for found in decoded if INCOMPLETE not in found[1]), None)

    def _might_go_on(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stops):
                return length
        return 0


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What one token stands for in UTF-8, which may be half a character; special ones by their name."""
    text, piece = str(tokenizer.decode([token], skip_special_tokens=False)), tokenizer.convert_ids_to_tokens(token)
    if INCOMPLETE not in text:
        blank = str(piece).startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" ")
        return f"{' ' * blank}{text}".encode()  # a tokenizer leaves out the blank that a text begins with
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", str(piece)):
        return bytes.fromhex(byte[1])
    letters = _byte_of_letter()
    return bytes(letters[letter] for letter in piece) if set(piece) <= set(letters) else text.encode()


@cache
def _byte_of_letter() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: those that can be seen as they are, then from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(others)}
