"""Tapes of a sampler whose road from noise to text is a bijection of states of numbers: written, walked and edited.

``invert`` places vectors around a text at the lowest noise and walks them to the highest; ``restore`` walks back, and
compares every state with its hash on the tape. Axes: b batch, l length, k streams of a state, d width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sedd_graph.component.progress import progress
from sedd_graph.engine.inversion import Held, Inversion, Reached
from sedd_graph.engine.samples import SampleRequest
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.errors import SeddGraphError, UserError
from sedd_graph.runs.activations import Recorder, observed, recording
from sedd_graph.runs.memory import require_sampling_memory
from sedd_graph.runs.open import Run
from sedd_graph.runs.tape import INVERTED, Columns, Marks, Part, Say, facts_of, parts_of, sampling_facts, starts
from sedd_graph.store.manifest import DamagedError
from sedd_graph.store.tape import MAX_NUMBERS, Tape, write_tape

__all__ = ["OnStep", "inversion_of", "invert_states", "noise_of", "restore_states", "walk_states"]

OnStep = Callable[[int, Tensor], None]
"""Callback for the number of a step and the rounded rows, int64 [b, l]."""


def inversion_of(run: Run, tape: Tape) -> Inversion:
    """Return the bijection that a tape of states was written with.

    Raises:
        DamagedError: The states or stored tokens are not those of the model.
    """
    found = run.engine.process.inversion(tape.facts.steps)
    if found is None or tape.arrays["states"].shape[1:] != found.shape:
        raise DamagedError(f"the tape's noise is not that of the sampler {run.plan.sampler_op}")
    if (tape.arrays["token"] >= found.tokens).any():
        raise DamagedError(f"a stored token of the tape is none of the model's {found.tokens:,}")
    return found


def invert_states(
    run: Run,
    rows: Sequence[Sequence[int]],
    inversion: Inversion,
    *,
    seed: int,
    batch: int,
    where: Path | None,
    activations: bool,
    ignore_memory: bool,
    say: Say,
) -> Path:
    """Walk texts to noise, verify the way back to the last bit, and write the noise to a tape.

    Args:
        run: The opened run folder.
        rows: Tokens of the texts.
        inversion: The sampler's bijection.
        seed: Seed of the noise around the texts.
        batch: Largest number of texts that are walked together.
        where: Path of the tape, which must not exist; None for the next free name in the run folder.
        activations: Whether the activations on the way back are stored beside the tape.
        ignore_memory: True to print a warning instead of raising an error if the run needs more memory than there is.
        say: Function that prints a line for the user.

    Returns:
        The path of the tape.

    Raises:
        UserError: The noise is too large for a tape, or the state leaves the range of the grid.
        SeddGraphError: The way back differs from the way there, for example since the network draws random numbers.
    """
    lengths = np.asarray([len(row) for row in rows], dtype=np.int64)
    tokens, (streams, width) = int(lengths.sum()), inversion.shape
    if tokens * streams * width > MAX_NUMBERS:
        raise UserError(f"invert: the noise has more than {MAX_NUMBERS:,} numbers: invert fewer texts at a time")
    parts, where_of, marks = parts_of(lengths, batch), list(starts(lengths)), Marks()
    largest = max(parts, key=lambda part: len(part.rows) * part.length)
    trial = SampleRequest(batch=len(largest.rows), length=largest.length, steps=inversion.steps)
    require_sampling_memory(run, trial, trajectory=False, ignore=ignore_memory, say=say)
    noise = np.zeros((tokens, streams, width), dtype=np.int64)
    decoded, text = np.zeros(tokens, dtype=np.int64), np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    network = run.engine.network
    target = where or run.path / INVERTED
    with (
        recording(run, target if activations else None) as recorder,
        progress("inverting", total=2 * len(parts), unit="part") as advance,
    ):
        for part in parts:
            wanted = torch.tensor([rows[i] for i in part.rows], dtype=torch.int64)
            state = inversion.around(network, wanted, torch.tensor([mix_seed(seed, i) for i in part.rows]))
            found = inversion.to_noise(network, state)
            advance()
            with observed(recorder, part.rows, part.length):
                reached = inversion.to_text(network, found, on_state=marks.add)
            if not torch.equal(reached.state, state):
                raise SeddGraphError("invert: the way back from the noise does not end at the vectors of the text")
            for row, of_row, back in zip(part.rows, found.numpy(), reached.tokens.numpy(), strict=True):
                noise[where_of[row]], decoded[where_of[row]] = of_row, back
            marks.add(wanted)
            advance()
        place = np.flatnonzero(decoded != text)
        arrays: Columns = {
            "marks": marks.array(),
            "lengths": lengths,
            "states": noise,
            "place": place,
            "token": text[place],
        }
        facts = facts_of(run, kind="vectors", seed=seed, batch=batch, **sampling_facts(run, trial))
        path = write_tape(target, Tape(facts=facts, arrays=arrays), numbers=where is None)
        if recorder is not None:
            recorder.tape = path
    say(
        f"{len(rows):,} texts, {tokens:,} tokens, {noise.size:,} numbers of noise; text -> vectors -> noise -> vectors -> "
        f"text is equal to the last bit"
    )
    if len(place):
        say(f"{len(place):,} tokens that the network does not decode at the lowest noise are stored as they are")
    return path


def noise_of(tape: Tape, part: Part) -> Tensor:
    """Return the states at the highest noise of one part of a tape, int64 [b, l, k, d]."""
    where = list(starts(tape.arrays["lengths"]))
    return torch.from_numpy(np.stack([tape.arrays["states"][where[row]] for row in part.rows]))


def restore_states(run: Run, tape: Tape, *, where: Path, recorder: Recorder | None = None) -> list[list[int]]:
    """Walk from the noise of a tape of states to its texts, and return their tokens.

    Args:
        run: The opened run folder, which has the model of the tape.
        tape: The tape, of kind ``vectors``.
        where: Path of the tape, for error messages.
        recorder: Recorder of activations; None: none are recorded.

    Raises:
        DamagedError: A state is not the recorded one.
    """
    inversion, lengths = inversion_of(run, tape), tape.arrays["lengths"]
    texts: list[list[int]] = [[] for _ in lengths]
    marks, parts = Marks(tape.arrays["marks"], where, tape.facts), parts_of(lengths, tape.facts.batch)
    stored, places = np.full(int(lengths.sum()), -1), list(starts(lengths))
    stored[tape.arrays["place"]] = tape.arrays["token"]
    with progress("restoring", total=len(parts), unit="part") as advance:
        for part in parts:
            with observed(recorder, part.rows, part.length):
                found = inversion.to_text(run.engine.network, noise_of(tape, part), on_state=marks.add)
            own = torch.from_numpy(np.stack([stored[places[row]] for row in part.rows]))
            tokens = torch.where(own < 0, found.tokens, own)
            marks.add(tokens)
            for row, line in zip(part.rows, tokens.tolist(), strict=True):
                texts[row] = line
            advance()
    marks.array()
    return texts


def walk_states(
    run: Run,
    tape: Tape,
    *,
    rows: Sequence[int],
    held: Held,
    places: Tensor,
    strength: float,
    seeds: Tensor,
    on_step: OnStep | None = None,
) -> Reached:
    """Walk from the noise of texts of a tape to other texts of one length, in which some tokens are given.

    Args:
        run: The opened run folder, which has the model of the tape.
        tape: The tape, of kind ``vectors``.
        rows: Index on the tape of the text of each row.
        held: The given tokens.
        places: Position on the tape of the noise of each token, int64 [b, l]; beyond the text's length for fresh noise.
        strength: Share of fresh noise, from 0 to 1.
        seeds: Seed of the fresh noise of each row, int64 [b].
        on_step: Callback for the number of each step and the rounded rows.
    """
    inversion, lengths = inversion_of(run, tape), tape.arrays["lengths"]
    new = places >= torch.from_numpy(lengths[list(rows)])[:, None]
    noise = []
    for row, own in zip(rows, places.masked_fill(new, 0), strict=True):
        noise.append(noise_of(tape, Part((row,), int(lengths[row])))[0, own])
    mixed = inversion.mixed(torch.stack(noise), new, strength=strength, seeds=seeds)
    return inversion.to_text(run.engine.network, mixed, held=held, on_step=on_step)
