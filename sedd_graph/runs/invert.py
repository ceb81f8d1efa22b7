"""The noise that leads a sampler to given texts: written by ``invert``, and run again by ``restore``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sedd_graph.component.progress import progress
from sedd_graph.diffusion.tokens.noise_record import FINAL, Changes
from sedd_graph.diffusion.tokens.noise_tape import NoiseTape
from sedd_graph.diffusion.tokens.road import Road
from sedd_graph.engine.samples import SampleRequest, Samples
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.errors import SeddGraphError, UserError
from sedd_graph.runs.activations import Recorder, observed, recording
from sedd_graph.runs.invert_states import invert_states, restore_states
from sedd_graph.runs.memory import require_sampling_memory
from sedd_graph.runs.open import Run
from sedd_graph.runs.tape import (
    INVERTED,
    Array,
    Columns,
    Marks,
    Part,
    Say,
    encode,
    facts_of,
    parts_of,
    require_free,
    require_same,
    sampling_facts,
    starts,
)
from sedd_graph.store.manifest import DamagedError
from sedd_graph.store.tape import MAX_ROWS, MAX_TOKENS, Tape, write_tape

__all__ = ["encoded", "invert_run", "noise_of", "request_of", "restore_run"]


def encoded(run: Run, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of texts, from which exactly these texts are decoded.

    Raises:
        UserError: The run has no tokenizer, there are too many texts or tokens, or the tokenizer does not have all
            characters of a text.
    """
    tokenizer = run.text_tokenizer()
    if not 1 <= len(texts) <= MAX_ROWS:
        raise UserError(f"a tape is of 1 to {MAX_ROWS:,} texts, not {len(texts):,}")
    found = [
        encode(tokenizer, text, "the text" if len(texts) == 1 else f"text {number}")
        for number, text in enumerate(texts, 1)
    ]
    if sum(map(len, found)) > MAX_TOKENS:
        raise UserError(f"the texts have more than {MAX_TOKENS:,} tokens: invert fewer at a time")
    if not any(found):
        raise UserError("there is no text to invert")
    return found


def request_of(part: Part, noise: NoiseTape, *, steps: int | None) -> SampleRequest:
    """Return the sampling request that runs the sampler with the noise of one part of a tape."""
    return SampleRequest(batch=len(part.rows), length=part.length, steps=steps, tape=noise)


def invert_run(
    run: Run,
    texts: Sequence[str],
    *,
    steps: int | None = None,
    seed: int = 0,
    batch: int = 64,
    where: Path | None = None,
    ignore_memory: bool = False,
    activations: bool = False,
    say: Say = lambda text: None,
) -> Path:
    """Draw the noise that leads the sampler of a run to given texts, verify it by a replay, and write it to a tape.

    Args:
        run: The opened run folder, of the family ``tokens``, or of one whose sampler has an exact inversion.
        texts: The texts, each the whole text of one sample.
        steps: Sampler steps; None for the number in the blueprint.
        seed: Seed of the noise.
        batch: Largest number of texts that are run together.
        where: Path of the tape, which must not exist; None for ``tape.zarr`` in the run folder, or the next free name
            with a number.
        ignore_memory: True to print a warning instead of raising an error if the run needs more memory than there is.
        activations: True to write the saved activations along the road beside the tape
            (:func:`sedd_graph.runs.activations.recording`).
        say: Function that prints a line for the user.

    Returns:
        The path of the tape.

    Raises:
        UserError: The model has no noise tapes, the texts have tokens that it lacks, or ``where`` exists.
    """
    process, _ = run.engine.process, run.plan.sampler_op  # raises for a graph without a process
    inversion = process.inversion(steps)
    if inversion is None and "tape" in process.refuses:
        raise UserError(f"invert: {process.refuses['tape']}; `sedd-graph sample --tape` writes the tape of samples")
    require_free(where)
    rows = encoded(run, texts)
    if inversion is not None:
        return invert_states(
            run,
            rows,
            inversion,
            seed=seed,
            batch=batch,
            where=where,
            activations=activations,
            ignore_memory=ignore_memory,
            say=say,
        )
    lengths = np.asarray([len(row) for row in rows], dtype=np.int64)
    seeds = np.asarray([mix_seed(seed, number) for number in range(len(rows))], dtype=np.int64)
    parts, found = parts_of(lengths, batch), _Recorded(int(lengths.sum()))
    where_of = list(starts(lengths))
    largest = max(parts, key=lambda part: len(part.rows) * part.length)
    trial = SampleRequest(batch=len(largest.rows), length=largest.length, steps=steps)
    require_sampling_memory(run, trial, trajectory=False, ignore=ignore_memory, say=say)
    marks = Marks()
    target = where or run.path / INVERTED
    with (
        recording(run, target if activations else None) as recorder,
        progress("inverting", total=2 * len(parts), unit="part") as advance,
    ):
        for part in parts:
            text = torch.tensor([rows[i] for i in part.rows], dtype=torch.int64)
            walked = _walked(run, part, text, torch.from_numpy(seeds[list(part.rows)]), steps, marks, recorder)
            advance()
            found.add(part, walked.start[:, : part.length], walked.changes, where_of)
            _verify(run, part, text, walked, steps)
            advance()
        facts = facts_of(run, kind="text", seed=seed, batch=batch, mask=walked.mask, **sampling_facts(run, trial))
        arrays: Columns = {"marks": marks.array(), "lengths": lengths, "seeds": seeds, **found.arrays()}
        path = write_tape(target, Tape(facts=facts, arrays=arrays), numbers=where is None)
        if recorder is not None:
            recorder.tape = path
    fixed = int((arrays["state"] == FINAL).sum())
    count, tokens = len(arrays["call"]), int(lengths.sum())
    say(f"{len(rows):,} texts, {tokens:,} tokens, {count:,} changes of noise ({count / max(1, tokens):.2f} per token)")
    if fixed:
        say(f"{fixed:,} tokens that the sampler cannot draw, such as at temperature 0, are stored as they are")
    if recorder is not None:
        say(f"activations of {recorder.records:,} evaluations of the network in {recorder.path}")
    return path


class _Walked(NamedTuple):
    """The road of one part: seeds [b], initial rows int64 [b, l], changes of noise, the mask, and the marks of the steps."""

    seeds: Tensor
    start: Tensor
    changes: Changes
    mask: int | None
    marks: Array


def _walked(
    run: Run, part: Part, text: Tensor, seeds: Tensor, steps: int | None, marks: Marks, recorder: Recorder | None
) -> _Walked:
    """Draw the noise that leads to the texts of one part, int64 [b, l]."""
    road = Road(text=text, held=torch.ones_like(text, dtype=torch.bool))
    noise = NoiseTape(seeds, device=run.engine.device, road=road)
    before = len(marks.array())
    mask = _played(run, part, noise, steps, marks, recorder).facts["mask"]
    if noise.start is None:
        raise SeddGraphError(f"invert: {run.plan.sampler_op} did not start from the tape")
    return _Walked(seeds, noise.start, noise.changes(), mask, marks.array()[before:])


def _verify(run: Run, part: Part, text: Tensor, walked: _Walked, steps: int | None) -> None:
    """Raise an error unless the recorded noise leads to the texts of one part by the same rows."""
    again = NoiseTape(walked.seeds, device=run.engine.device, start=walked.start, changes=walked.changes)
    check = Marks(walked.marks, run.path / INVERTED, facts=None)
    made = _played(run, part, again, steps, check, None)
    check.array()
    if not torch.equal(made.rows, text):
        raise SeddGraphError("invert: the replay did not end at the text")


class _Recorded:
    """Noise of the parts of a tape, recorded one after another.

    Args:
        tokens: Number of tokens of all rows.
    """

    def __init__(self, tokens: int) -> None:
        self._start = np.zeros(tokens, dtype=np.int32)
        self._changes: list[Changes] = []

    def add(self, part: Part, start: Tensor, changes: Changes, where: Sequence[slice]) -> None:
        """Add the initial rows [b, l] and the changes of noise of one part."""
        for row, tokens in zip(part.rows, start.cpu().numpy(), strict=True):
            self._start[where[row]] = tokens
        self._changes.append(changes._replace(row=torch.tensor(part.rows)[changes.row]))

    def arrays(self) -> Columns:
        """Return the arrays of the tape."""
        whole = Changes.joined(self._changes)
        return {
            "start": self._start,
            "call": whole.call.numpy(),
            "row": whole.row.numpy().astype(np.int32),
            "place": whole.place.numpy().astype(np.int32),
            "state": whole.state.numpy().astype(np.int32),
            "value": whole.value.numpy(),
        }


def _played(
    run: Run, part: Part, noise: NoiseTape, steps: int | None, marks: Marks, recorder: Recorder | None
) -> Samples:
    """Run the sampler with the noise of one part, and record or compare the rows after each step."""
    request = request_of(part, noise, steps=steps)
    request = dataclasses.replace(request, on_step=lambda _, rows: marks.add(rows))
    with observed(recorder, part.rows, part.length):
        made = run.engine.generate(request)
    marks.add(made.rows)
    return made


def noise_of(tape: Tape, part: Part) -> tuple[Tensor, Tensor, Changes]:
    """Return the seeds [b], the initial rows int64 [b, l] and the changes of noise of one part of a tape."""
    arrays = tape.arrays
    where = list(starts(arrays["lengths"]))
    start = torch.tensor(np.stack([arrays["start"][where[row]] for row in part.rows]).astype(np.int64))
    local = np.full(len(arrays["lengths"]), -1)
    local[list(part.rows)] = np.arange(len(part.rows))
    chosen = np.flatnonzero(local[arrays["row"]] >= 0)
    chosen = chosen[np.argsort(arrays["call"][chosen], kind="stable")]
    columns = {name: arrays[name][chosen] for name in ("call", "place", "state", "value")}
    row = torch.from_numpy(local[arrays["row"][chosen]])
    call, place, state = (torch.from_numpy(columns[name].astype(np.int64)) for name in ("call", "place", "state"))
    value = torch.from_numpy(columns["value"].astype(np.float64))
    return torch.from_numpy(arrays["seeds"][list(part.rows)]), start, Changes(call, row, place, state, value)


def restore_run(run: Run, tape: Tape, *, where: Path, recorder: Recorder | None = None) -> list[list[int]]:
    """Run the sampler of a run with the noise of a tape of texts, and return the texts' tokens.

    Args:
        run: The opened run folder.
        tape: The tape, of kind ``text`` or ``vectors``.
        where: Path of the tape, for error messages.
        recorder: Recorder of activations; None: none are recorded.

    Raises:
        UserError: The run folder has another model than the tape was written with.
        DamagedError: The rows after a step are not those that were recorded.
    """
    require_same(tape.facts, run, where)
    if tape.facts.kind == "vectors":
        return restore_states(run, tape, where=where, recorder=recorder)
    lengths, batch = tape.arrays["lengths"], tape.facts.batch
    texts: list[list[int]] = [[] for _ in lengths]
    marks, parts = Marks(tape.arrays["marks"], where, tape.facts), parts_of(lengths, batch)
    with progress("restoring", total=len(parts), unit="part") as advance:
        for part in parts:
            seeds, start, changes = noise_of(tape, part)
            noise = NoiseTape(seeds, device=run.engine.device, start=start.to(run.engine.device), changes=changes)
            try:
                made = _played(run, part, noise, tape.facts.steps, marks, recorder)
            except ValueError as error:  # noise of a forged tape that leads to no sample
                raise DamagedError(f"{where} cannot be repeated: {error}") from None
            for row, tokens in zip(part.rows, made.rows.tolist(), strict=True):
                texts[row] = tokens
            advance()
    marks.array()
    return texts
