"""Blueprints broken at random: by bytes, by lines, and by swapping scalars. Only blueprint errors may come out."""

import random
import time
from pathlib import Path

from sedd_graph.api import check
from sedd_graph.errors import SeddGraphError

WORDS = ["1e-3", ".nan", "${params.dim}", "${oc.env:HOME}", "-1", "99999999999999", "???", "*a", "&a", "[]", "{}", "null", "true", "!!x", "'", "1//0", "batch", "d*d*d*d*d*d*d*d*d", "../../etc/passwd", "\x00", "é", "<<", "x" * 300]  # fmt: skip


def mutate(text: str, rng: random.Random) -> bytes:
    """One to four changes of one blueprint."""
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(5)
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        if kind == 0:
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif kind == 1:
            del lines[at]
        elif kind == 2:
            lines[at] = " " * rng.randrange(4) + lines[at]
        elif kind == 3:
            parts = lines[at].split(" ")
            parts[rng.randrange(len(parts))] = rng.choice(WORDS)
            lines[at] = " ".join(parts)
        text = "\n".join(lines) or "a"
        if kind == 4:
            place = rng.randrange(len(text))
            text = text[:place] + chr(rng.randrange(1, 255)) + text[place + rng.randrange(3) :]
    raw = text.encode()
    if rng.random() < 0.05:
        place = rng.randrange(len(raw))
        raw = raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :]
    return raw


def run(sources: list[str], folder: Path, *, count: int, seed: int) -> dict[str, int]:
    """Check ``count`` mutants. Returns how many were refused and accepted; raises on anything but a SeddGraphError."""
    rng, outcome = random.Random(seed), {"refused": 0, "accepted": 0}
    path = folder / "mutant.yaml"
    for _ in range(count):
        raw = mutate(rng.choice(sources), rng)
        path.write_bytes(raw)
        began = time.monotonic()
        try:
            check(path)
            outcome["accepted"] += 1
        except SeddGraphError:
            outcome["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{raw!r}") from error
        assert time.monotonic() - began < 5, raw
    return outcome
