# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a command runs: a tqdm bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from dilseg.engine.files import require

__all__ = ["Progress", "say"]

PLAIN_SECONDS = 30.0


def say(text: str, *, quiet: bool = False) -> None:
    """Prints a line on stdout at once, above a running progress bar.

    Args:
        text: The line.
        quiet: Print nothing (processes other than the first).
    """
    if quiet:
        return
    if sys.stderr.isatty() and "tqdm" in sys.modules:
        require("tqdm", "the progress bar").tqdm.write(text)
    else:
        print(text, flush=True)


class Progress:
    """Counts steps on stderr.

    On a terminal this is a tqdm bar. Elsewhere (a log file, a pipe, CI) it is a plain line at the
    first step, every half a minute and at the end.

    Args:
        total: Steps in all.
        label: What is counted, such as ``train``.
        done: Steps already done before (a resumed run).
        quiet: Show nothing (processes other than the first).

    Raises:
        ImportError: On a terminal without tqdm.
    """

    def __init__(self, total: int, label: str, *, done: int = 0, quiet: bool = False) -> None:
        """See the class."""
        self._total, self._label, self._done, self._first = total, label, done, done
        self._quiet = quiet
        self._started = self._shown = time.monotonic()
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            tqdm = require("tqdm", "the progress bar").tqdm
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=label,
                dynamic_ncols=True,
                leave=None,  # an evaluation's bar goes when it is done, its training's stays
                file=sys.stderr,
            )

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Moves on by `steps`, with `note` such as ``loss 0.71`` beside the count."""
        self._done += steps
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(steps)
            return
        now = time.monotonic()
        is_edge = self._done - steps == self._first or self._done == self._total
        if is_edge or now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            rate = (self._done - self._first) / max(now - self._started, 1e-9)
            left = (self._total - self._done) / rate if rate > 0 else 0.0
            speed = f"{rate:.2f}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"
            text = f"{self._label} {self._done}/{self._total} ({speed}, {left / 60:.1f} min left)"
            print(f"{text} {note}".rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar; further lines print normally."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        """Does nothing."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the bar."""
        self.close()
