"""Texts noised by the forward process, with bitstreams that lead back to them: ``invert --by kernel``, and its ``restore``.

No network is evaluated. Texts are noised in parts, each with a bitstream of its own, so that memory is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sedd_graph.component.progress import progress
from sedd_graph.diffusion.bitstream.bitstream import Bitstream
from sedd_graph.diffusion.bitstream.reversible import ReversibleNoise
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.errors import SeddGraphError, UserError
from sedd_graph.runs.open import Run
from sedd_graph.runs.tape import INVERTED, Array, Say, encode, facts_of, require_free, require_same, starts
from sedd_graph.store.manifest import DamagedError
from sedd_graph.store.tape import MAX_ROWS, MAX_TOKENS, Tape, write_tape

__all__ = ["denoise_run", "noise_run"]

_AREA = 2**22
"""Largest number of positions of a part: its number of texts times the tokens of the longest."""


def noise_run(
    run: Run,
    texts: Sequence[str],
    *,
    until: float = 1.0,
    steps: int = 1,
    seed: int = 0,
    batch: int = 1024,
    where: Path | None = None,
    say: Say = lambda text: None,
) -> Path:
    """Noise texts by the kernel of a run, verify the way back, and write noise and bitstreams to a tape.

    Args:
        run: The opened run folder, of a process of tokens or strings.
        texts: The texts; empty ones are left as they are, except by a kernel that inserts tokens.
        until: Time of the noise, in (0, 1].
        steps: Number of steps of noise, which divide the time evenly. The bitstream records every step.
        seed: Seed of the noise.
        batch: Largest number of texts that are noised together.
        where: Path of the tape, which must not exist; None for ``tape.zarr`` in the run folder, or the next free name
            with a number.
        say: Function that prints a line for the user.

    Returns:
        The path of the tape.

    Raises:
        UserError: The process has no reversible noise, the tokenizer lacks a character, or ``where`` exists.
    """
    reversible = run.engine.process.reversible_noise()
    require_free(where)
    if not 1 <= len(texts) <= MAX_ROWS:
        raise UserError(f"a tape is of 1 to {MAX_ROWS:,} texts, not {len(texts):,}")
    times, parts, clean = _times(reversible, until, steps), list[_NoisyPart](), 0
    with progress("noising", total=len(texts), unit="text") as advance:
        for rows in _parts(run, texts, batch):
            part = _noised(reversible, rows, times, mix_seed(seed, len(parts)))
            parts.append(part)
            clean += sum(map(len, rows))
            if max(clean, sum(len(p.noise) for p in parts)) > MAX_TOKENS:
                raise UserError(f"texts or noise have more than {MAX_TOKENS:,} tokens: invert fewer at a time")
            advance(len(rows))
    arrays: dict[str, Array] = {
        "noise": np.concatenate([part.noise for part in parts]),
        "lengths": np.concatenate([part.lengths for part in parts]),
        "rows": np.asarray([len(part.lengths) for part in parts], dtype=np.int64),
        "bitstream": np.frombuffer(b"".join(part.bitstream for part in parts), dtype=np.uint8),
        "sizes": np.asarray([len(part.bitstream) for part in parts], dtype=np.int64),
    }
    facts = facts_of(run, kind="noise", seed=seed, batch=batch, steps=steps, until=until, mask=reversible.mask)
    path = write_tape(where or run.path / INVERTED, Tape(facts=facts, arrays=arrays), numbers=where is None)
    bits, information, many = sum(p.bits for p in parts), sum(p.information for p in parts), max(1, clean)
    say(f"{len(texts):,} texts, {clean:,} tokens, noise of {len(arrays['noise']):,} tokens at time {until:g}")
    say(
        f"record of {bits:,} bits ({bits / many:.3f} per token); information that noise erased: "
        f"{information:,.0f} bits ({information / many:.3f} per token)"
    )
    return path


class _NoisyPart:
    """Noisy texts that were noised together, and their bitstream."""

    def __init__(self, texts: Sequence[Sequence[int]], bitstream: Bitstream) -> None:
        self.lengths = np.asarray([len(text) for text in texts], dtype=np.int64)
        self.noise = np.asarray([token for text in texts for token in text], dtype=np.int32)
        self.bitstream, self.bits, self.information = bitstream.to_bytes(), bitstream.bits, bitstream.information


def _times(reversible: ReversibleNoise, until: float, steps: int) -> list[float]:
    """Return the times of the noise, which divide (0, until] evenly; in discrete time, as far as the kernel's steps allow."""
    times = [until * (step / steps) for step in range(1, steps + 1)]
    if (total := reversible.total) is None:
        return times
    found = [round(time * total) / total for time in times]
    if len({0.0, *found}) != steps + 1:
        raise UserError(f"--steps {steps} to time {until:g} are more than the steps of the kernel, {total:,} in all")
    return found


def _parts(run: Run, texts: Sequence[str], batch: int) -> Iterator[list[list[int]]]:
    """Yield the tokens of texts that are noised together."""
    tokenizer, part, longest = run.text_tokenizer(), list[list[int]](), 0
    for number, text in enumerate(texts, 1):
        tokens = encode(tokenizer, text, "the text" if len(texts) == 1 else f"text {number}")
        longest = max(longest, len(tokens))
        if part and (len(part) == batch or (len(part) + 1) * longest > _AREA):
            yield part
            part, longest = [], len(tokens)
        part.append(tokens)
    yield part


def _noised(reversible: ReversibleNoise, rows: list[list[int]], times: Sequence[float], seed: int) -> _NoisyPart:
    """Noise texts, and verify that their bitstream leads back."""
    new = Bitstream.new(seed, len(rows), -(-sum(map(len, rows)) // len(rows)))
    noisy, bitstream = reversible.noise(rows, times, new)
    part = _NoisyPart(noisy, bitstream)
    if reversible.denoise(noisy, times, Bitstream.from_bytes(part.bitstream)) != rows:
        raise SeddGraphError("invert: the bitstream does not lead back to the text")
    return part


def denoise_run(run: Run, tape: Tape, *, where: Path) -> list[list[int]]:
    """Return the tokens of the texts of a tape of kind ``noise``.

    Args:
        run: The opened run folder.
        tape: The tape.
        where: Path of the tape, for error messages.

    Raises:
        UserError: The run folder has another kernel, schedule or tokenizer than the tape was written with.
        DamagedError: Noise or bitstream were altered.
    """
    require_same(tape.facts, run, where)
    facts, arrays = tape.facts, tape.arrays
    if facts.until is None or facts.steps is None:
        raise DamagedError(f"{where}: attribute tape: the time of the noise is missing")
    reversible = run.engine.process.reversible_noise()
    times, texts = _times(reversible, facts.until, facts.steps), list[list[int]]()
    rows, data = list(starts(arrays["lengths"])), arrays["bitstream"].tobytes()
    with progress("restoring", total=len(rows), unit="text") as advance:
        for part, held in zip(starts(arrays["rows"]), starts(arrays["sizes"]), strict=True):
            noisy = [arrays["noise"][row].tolist() for row in rows[part]]
            try:
                texts += reversible.denoise(noisy, times, Bitstream.from_bytes(data[held]))
            except UserError as error:
                raise DamagedError(f"{where}, texts {part.start + 1} to {part.stop}: {error}") from None
            advance(len(noisy))
    return texts
