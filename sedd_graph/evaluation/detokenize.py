"""Detokenizers of published evaluations: text that was split at its punctuation becomes ordinary text again.

The rules are those of the public code of SEDD (arXiv 2310.16834) and MDLM (arXiv 2406.07524), their quirks included, since
perplexities depend on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

__all__ = ["DETOKENIZERS"]

Rule = tuple[str | re.Pattern[str], str]
"""What is replaced, as text or as a pattern, and by what."""


def _apply(text: str, rules: Sequence[Rule]) -> str:
    for old, new in rules:
        text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
    return text


def _attached(marks: str) -> list[Rule]:
    """Rules that attach punctuation between blanks to the word before it."""
    return [(f" {mark} ", f"{mark} ") for mark in marks]


def _within(opening: str, closing: str, inside: str) -> Rule:
    """Rule that removes blanks at both ends of what a pair of marks encloses; ``inside`` is its pattern."""
    return re.compile(f"{opening}{inside}{closing}"), f"{opening[-1]}\\1{closing[-1]}"


_WIKITEXT: list[Rule] = [
    ("s '", "s'"),
    (re.compile("/' [0-9]/"), "/'[0-9]/"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *_attached(":;.!?,"),
    _within(r"\(", r"\)", r"\s*([^\)]*?)\s*"),
    _within(r"\[", r"\]", r"\s*([^\]]*?)\s*"),
    _within("{", "}", r"\s*([^}]*?)\s*"),
    _within('"', '"', r"\s*([^\"]*?)\s*"),
    _within("'", "'", r"\s*([^']*?)\s*"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]

_PTB: list[Rule] = [
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    *[(" N ", " 1 ")] * 10,
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
]

_LM1B: list[Rule] = [
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" \!$"), "!"),
    *_attached(",:;"),
    (" / ", "/"),
    _within('"', '"', ' ([^"]+) '),
    _within("'", "'", " ([^']+) "),
    _within(r"\(", r"\)", r" ([^\(\)]+) "),
    _within(r"\[", r"\]", r" ([^\[\]]+) "),
    ("$ ", "$"),
    ("\N{POUND SIGN} ", "\N{POUND SIGN}"),
]


def _lambada(text: str) -> str:
    """Return the text with straight double quotes, after a line break, without white space around it."""
    return (
        "\n" + _apply(text, [("\N{LEFT DOUBLE QUOTATION MARK}", '"'), ("\N{RIGHT DOUBLE QUOTATION MARK}", '"')]).strip()
    )


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "wikitext": lambda text: _apply(text, _WIKITEXT),
    "ptb": lambda text: _apply(text, _PTB),
    "lm1b": lambda text: _apply(text, _LM1B),
    "lambada": _lambada,
    "scientific_papers": lambda text: _apply(text, [*_WIKITEXT, *_LM1B]),
}
"""Functions from the text of a document to ordinary text, by name."""
