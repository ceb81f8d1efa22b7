"""Printing of text that may hold anything, such as sampled text, file names and error messages of other libraries.

A terminal executes the control characters that it is sent: escape sequences move its cursor, change its title or report
its content. Texts of models and of untrusted files are therefore printed with control characters spelled out.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

__all__ = ["printable", "say"]

# C0 but for tab and line feed, DEL, C1, the overrides and isolates of text direction, and surrogates
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return ``text`` with control characters spelled out, such as ``\x1b`` for ESC; line feeds and tabs remain.

    Bytes of file names that are not UTF-8, which Python represents by surrogates, are spelled out as bytes.
    """
    return _CONTROL.sub(_spelled, text)


def _spelled(found: re.Match[str]) -> str:
    code = ord(found[0])
    code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def say(text: str, file: TextIO | None = None) -> None:
    """Print ``text`` with control characters spelled out (:func:`printable`), and flush.

    Args:
        text: The text.
        file: The stream, standard output by default. Characters that its encoding lacks are spelled out, too.
    """
    stream = sys.stdout if file is None else file
    encoding = stream.encoding or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
