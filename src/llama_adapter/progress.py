"""Progress bars: tqdm's on a terminal, and a line now and then where standard error is a file or a pipe."""

import sys
import time
from typing import Any

SECONDS = 30.0
"""Between two lines of progress in a file."""


def progress_bar(total: int, unit: str, desc: str | None = None, initial: int = 0, disable: bool = False) -> Any:
    """A `tqdm` on standard error, to be used in a `with` block; TQDM_DISABLE=1 turns it off."""
    from tqdm.auto import tqdm

    watched = sys.stderr is not None and sys.stderr.isatty()
    off = {"disable": True} if disable else {}  # said only then: it would overrule TQDM_DISABLE
    kind: Any = tqdm if watched or "ipykernel" in sys.modules else _lines()
    return kind(total=total, unit=unit, desc=desc, initial=initial, file=sys.stderr, **off)


def say(bar: Any, text: str) -> None:
    """A line beside a bar on standard error, above it where that is drawn."""
    if bar.disable:
        return
    if hasattr(bar, "said"):
        print(text, file=bar.fp, flush=True)
    else:
        bar.write(text, file=bar.fp)


def _lines() -> type:
    from tqdm import tqdm

    class Lines(tqdm):
        """Says where it stands every `SECONDS` and at the end, in lines of their own."""

        def __init__(self, **options: Any) -> None:
            self.said = time.monotonic()
            super().__init__(**options, ascii=True, ncols=100)

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            """Called by tqdm as often as a bar on a terminal would be drawn."""
            if time.monotonic() - self.said >= SECONDS:
                self._say()

        def close(self) -> None:
            """Say how it ended, once."""
            if not self.disable:
                self._say()
                self.disable = True

        def _say(self) -> None:
            self.said = time.monotonic()
            print(self, file=self.fp, flush=True)

    return Lines
