"""Subcommand ``edit``: change a text on a noise tape, and walk to the new text with the noise of the old one.

The sampler runs from the tape's initial rows with the tape's noise (DICE, arXiv 2410.08207). The tokens of the new words
are given; at all other positions the noise is that of the tape, mixed with fresh noise, so that a token changes only
where the model's distribution or the fresh noise makes another one more likely. Axes: b batch, l length.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedd_graph.component.progress import progress
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.diffusion.tokens.noise_record import Changes
from sedd_graph.diffusion.tokens.noise_tape import NoiseTape
from sedd_graph.diffusion.tokens.road import Road
from sedd_graph.engine.inversion import Held
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.errors import UserError
from sedd_graph.runs.invert import encoded, noise_of, request_of, restore_run
from sedd_graph.runs.invert_states import OnStep, walk_states
from sedd_graph.runs.open import Run
from sedd_graph.runs.tape import Part, Say, parts_of
from sedd_graph.store.arrays import write_samples
from sedd_graph.store.tape import Tape

__all__ = ["EDITED", "Edit", "Span", "edit_run", "replace_in", "span_in"]

EDITED = "edited.zarr"
"""File name, in a run folder, of edited texts."""


class Span(NamedTuple):
    """One change of a text: its characters from ``start`` up to ``stop`` become ``new``."""

    start: int
    stop: int
    new: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """A text of a tape, and how it changes.

    Attributes:
        row: Index of the text on the tape.
        spans: Changes, in order, which do not overlap; empty: only the noise changes.
    """

    row: int
    spans: tuple[Span, ...] = ()


def replace_in(old: str, new: str) -> Callable[[str], tuple[Span, ...]]:
    """Return the function that finds all places where ``old`` is replaced by ``new`` in a text."""

    def find(text: str) -> tuple[Span, ...]:
        found, at = [], text.find(old)
        while at >= 0:
            found.append(Span(at, at + len(old), new))
            at = text.find(old, at + len(old))
        return tuple(found)

    return find


def span_in(start: int, stop: int, new: str) -> Callable[[str], tuple[Span, ...]]:
    """Return the function that replaces the characters of a text from ``start`` up to ``stop`` by ``new``.

    Raises:
        UserError: (by the function) The text is shorter.
    """

    def find(text: str) -> tuple[Span, ...]:
        if not 0 <= start <= stop <= len(text):
            raise UserError(f"--span {start}:{stop} is no part of the text, which has {len(text)} characters")
        return (Span(start, stop, new),)

    return find


class _Aligned(NamedTuple):
    """The tokens of an edited text: ``tokens``, the tape's position of each (``places``), and which are ``held``."""

    tokens: list[int]
    places: list[int]
    held: list[bool]


def _edges(tokens: Sequence[int], pieces: Sequence[bytes | None]) -> list[tuple[int, int]]:
    """Return the range of bytes of each token in the text."""
    found, at = [], 0
    for token in tokens:
        size = len(pieces[token] or b"")
        found.append((at, at + size))
        at += size
    return found


def _align(old: str, before: list[int], after: list[int], spans: Sequence[Span], tokenizer: Tokenizer) -> _Aligned:
    """Align the tokens of an edited text with those of the original.

    A token outside the changed words that is the same in both texts has its place; all others are held. Those take the
    places that are left, in order, so that they appear when the old words did; more of them have new places, behind those
    of the tape.
    """
    shifts: list[tuple[int, int, int]] = []  # kept bytes of the new text: from, to, and how far they moved
    new_words: list[tuple[int, int]] = []
    at = moved = 0
    for span in spans:
        start, stop = len(old[: span.start].encode()), len(old[: span.stop].encode())
        shifts.append((at + moved, start + moved, moved))
        size = len(span.new.encode())
        new_words.append((start + moved, start + moved + size))
        at, moved = stop, moved + size - (stop - start)
    shifts.append((at + moved, 2**62, moved))
    pieces = tokenizer.pieces()
    where = {edge: i for i, edge in enumerate(_edges(before, pieces))}
    places: list[int | None] = []
    for token, (start, stop) in zip(after, _edges(after, pieces), strict=True):
        move = next((m for low, high, m in shifts if low <= start and stop <= high), None)
        place = None if move is None else where.get((start - move, stop - move))
        known = place is not None and before[place] == token
        places.append(place if known else None)
    unused = sorted(set(range(len(before))).difference(p for p in places if p is not None))
    left = itertools.chain(unused, itertools.count(len(before)))
    return _Aligned(after, [next(left) if p is None else p for p in places], [p is None for p in places])


def edit_run(
    run: Run,
    tape: Tape,
    edits: Callable[[str], tuple[Span, ...]] | None,
    *,
    where: Path,
    row: int | None = None,
    strength: float = 0.3,
    seed: int = 0,
    say: Say = lambda text: None,
) -> Path:
    """Edit texts of a tape and store them in the run folder, with the two roads of the first edited text.

    Args:
        run: The opened run folder.
        tape: The tape, of kind ``text`` or ``vectors``.
        edits: Function that returns the changes of a text; None to change only the noise.
        where: Path of the tape.
        row: Index of the only text to edit; None: all in which ``edits`` finds something to change.
        strength: Share of fresh noise, in [0, 1]. 0: nothing changes, and the result is the text of the tape.
        seed: Seed of the fresh noise.
        say: Function that prints a line for the user: the edited texts, and how many tokens were kept.

    Returns:
        The path of the stored texts.

    Raises:
        UserError: The tape is that of another model, no text has anything to change, or an edited text is empty or has
            tokens that the model lacks.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"--strength must be from 0 to 1, not {strength:g}")
    if tape.facts.kind not in ("text", "vectors"):
        raise UserError(f"edit: {where} holds no noise of a sampler for a text: write a tape with `sedd-graph invert`")
    tokenizer, lengths = run.text_tokenizer(), tape.arrays["lengths"]
    if row is not None and not 0 <= row < len(lengths):
        raise UserError(f"--line must be from 1 to {len(lengths)}, the number of texts on the tape, not {row + 1}")
    wanted = [i for i in range(len(lengths)) if lengths[i] and row in (None, i)]
    originals = restore_run(run, tape, where=where)
    texts = [tokenizer.decode(tokens) for tokens in originals]
    found = [Edit(row=i, spans=() if edits is None else edits(texts[i])) for i in wanted]
    chosen = [edit for edit in found if edit.spans or edits is None]
    if not chosen:
        raise UserError(
            "edit: the word to replace is in no text of the tape" if wanted else "edit: the tape has no text"
        )
    rows = [originals[edit.row] for edit in chosen]
    aligned = _aligned(run, chosen, texts, rows)
    made, edited = list(rows), _Road()
    original = _original(run, tape, chosen[0].row)
    if strength > 0:
        made = _walked(run, tape, chosen, aligned, strength=strength, seed=seed, road=edited)
    for edit, old, new, known in zip(chosen, rows, made, aligned, strict=True):
        if strength > 0:
            others = [(old[p], n) for p, n, h in zip(known.places, new, known.held, strict=True) if not h]
            same = sum(a == b for a, b in others)
            say(f"--- {edit.row + 1}: {same:,} of {len(others):,} other tokens kept")
        else:
            say(f"--- {edit.row + 1}: strength 0 changes nothing")
        say(tokenizer.decode(new))
    roads = {"original": np.stack(original.rows), "edited": np.stack(edited.rows or original.rows)}
    notes: dict[str, str | float | None] = {
        "tape": where.name,
        "strength": strength,
        "seed": seed,
        "mask": tape.facts.mask,
    }
    return _store(run, made, chosen, roads, notes)


def _aligned(run: Run, chosen: Sequence[Edit], texts: Sequence[str], rows: Sequence[list[int]]) -> list[_Aligned]:
    """Return the tokens of the edited texts, aligned with the original ones."""
    wanted = []
    for edit in chosen:
        text = texts[edit.row]
        for span in reversed(edit.spans):
            text = text[: span.start] + span.new + text[span.stop :]
        wanted.append(text)
    if not all(wanted):
        raise UserError("edit: nothing would be left of a text")
    after, tokenizer = encoded(run, wanted), run.text_tokenizer()
    return [
        _align(texts[edit.row], old, new, edit.spans, tokenizer)
        for edit, old, new in zip(chosen, rows, after, strict=True)
    ]


def _walked(
    run: Run,
    tape: Tape,
    chosen: Sequence[Edit],
    aligned: Sequence[_Aligned],
    *,
    strength: float,
    seed: int,
    road: _Road,
) -> list[list[int]]:
    """Run the sampler with the noise of the tape to the edited texts, and return their tokens."""
    made = [list[int]() for _ in chosen]
    lengths = np.asarray([len(new.tokens) for new in aligned], dtype=np.int64)
    parts = parts_of(lengths, tape.facts.batch)
    walk = _walked_states if tape.facts.kind == "vectors" else _walked_choices
    with progress("editing", total=len(parts), unit="part") as advance:
        for part in parts:
            which = [(chosen[i], aligned[i]) for i in part.rows]
            on_step = road if part.rows[0] == 0 else None
            found = walk(run, tape, which, strength=strength, seed=seed, on_step=on_step)
            for i, tokens in zip(part.rows, found.tolist(), strict=True):
                made[i] = tokens
            advance()
    return made


def _walked_choices(
    run: Run, tape: Tape, which: Sequence[tuple[Edit, _Aligned]], *, strength: float, seed: int, on_step: OnStep | None
) -> Tensor:
    """Run the sampler with the noise of a tape of kind ``text`` to edited texts of one length, int64 [b, l]."""
    device = run.engine.device
    found = [_first(tape, edit, new) for edit, new in which]
    changes = [c._replace(row=torch.full_like(c.row, i)) for i, (_, _, c) in enumerate(found)]
    noise = NoiseTape(
        torch.cat([seeds for seeds, _, _ in found]),
        device=device,
        start=torch.cat([start for _, start, _ in found]).to(device),
        changes=Changes.sorted(changes),
        road=Road(
            text=torch.tensor([new.tokens for _, new in which]),
            held=torch.tensor([new.held for _, new in which]),
        ),
        places=torch.tensor([new.places for _, new in which]),
        strength=strength,
        fresh=mix_seed(seed),
    )
    request = request_of(Part(tuple(range(len(which))), len(which[0][1].tokens)), noise, steps=tape.facts.steps)
    return run.engine.generate(dataclasses.replace(request, on_step=on_step)).rows


def _walked_states(
    run: Run, tape: Tape, which: Sequence[tuple[Edit, _Aligned]], *, strength: float, seed: int, on_step: OnStep | None
) -> Tensor:
    """Walk with the noise of a tape of kind ``vectors`` to edited texts of one length, int64 [b, l]."""
    tokens, places = (torch.tensor([getattr(new, name) for _, new in which]) for name in ("tokens", "places"))
    return walk_states(
        run,
        tape,
        rows=[edit.row for edit, _ in which],
        held=Held(tokens, torch.tensor([new.held for _, new in which])),
        places=places,
        strength=strength,
        seeds=torch.tensor([mix_seed(seed, edit.row) for edit, _ in which]),
        on_step=on_step,
    ).tokens


def _first(tape: Tape, edit: Edit, new: _Aligned) -> tuple[Tensor, Tensor, Changes]:
    """Return the seed [1], the initial row int64 [1, l], -1 at new places, and the changes of noise of an edited text."""
    seeds, start, changes = noise_of(tape, Part((edit.row,), int(tape.arrays["lengths"][edit.row])))
    places = torch.tensor([new.places])
    first = torch.where(places < start.shape[1], start.gather(1, places.clamp(max=start.shape[1] - 1)), -1)
    return seeds, first, changes


class _Road:
    """The rows after each step of one run, of one text. :attr:`rows` is int32 [l] for each step."""

    def __init__(self) -> None:
        self.rows: list[npt.NDArray[np.int32]] = []

    def __call__(self, number: int, tokens: Tensor) -> None:
        """Note the rows [1, l] after one step."""
        self.rows.append(tokens[0].cpu().numpy().astype(np.int32))


def _original(run: Run, tape: Tape, row: int) -> _Road:
    """Return the road to one text of the tape."""
    if tape.facts.kind == "vectors":
        road, places = _Road(), torch.arange(int(tape.arrays["lengths"][row]))[None]
        nothing = Held(torch.zeros_like(places), torch.zeros_like(places, dtype=torch.bool))
        seeds = torch.zeros(1, dtype=torch.int64)
        walk_states(run, tape, rows=[row], held=nothing, places=places, strength=0.0, seeds=seeds, on_step=road)
        return road
    part, road, device = Part((row,), int(tape.arrays["lengths"][row])), _Road(), run.engine.device
    seeds, start, changes = noise_of(tape, part)
    noise = NoiseTape(seeds, device=device, start=start.to(device), changes=changes)
    run.engine.generate(dataclasses.replace(request_of(part, noise, steps=tape.facts.steps), on_step=road))
    return road


def _store(
    run: Run,
    made: Sequence[list[int]],
    chosen: Sequence[Edit],
    roads: Mapping[str, npt.NDArray[np.int32]],
    notes: Mapping[str, str | float | None],
) -> Path:
    """Write the edited texts, padded to one length, with the two roads of the first."""
    tokenizer = run.text_tokenizer()
    lengths = np.asarray([len(tokens) for tokens in made], dtype=np.int64)
    tokens = np.zeros((len(made), int(lengths.max())), dtype=np.int64)
    for row, found in zip(tokens, made, strict=True):
        row[: len(found)] = found
    lines = np.asarray([edit.row for edit in chosen], dtype=np.int64)
    return write_samples(
        run.path / EDITED,
        {"tokens": tokens, "lengths": lengths, "line": lines, **roads},
        text=[tokenizer.decode(row) for row in made],
        attributes={"sampler": run.plan.sampler_op, "weights": run.weights, **notes},
    )
