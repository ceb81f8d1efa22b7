"""Subcommands ``sample`` and ``infill``: draw samples from the model of a run folder, and store them there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedd_graph.component.progress import progress
from sedd_graph.data.config import DataConfig
from sedd_graph.engine.samples import Prompt, SampleRequest, TextWithHoles
from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.runs.activations import observed, recording
from sedd_graph.runs.frames import Frames, quantised
from sedd_graph.runs.memory import require_sampling_memory
from sedd_graph.runs.open import Run
from sedd_graph.runs.precision import dtype_name
from sedd_graph.runs.provenance import revision
from sedd_graph.runs.tape import Marks, facts_of, require_free, sampling_facts
from sedd_graph.store.arrays import write_samples
from sedd_graph.store.tape import Tape, write_tape

__all__ = ["read_prompt", "sample_run", "sampling_attributes"]


def sample_run(
    run: Run,
    request: SampleRequest,
    *,
    trajectory: bool = False,
    name: str = "samples.zarr",
    notes: Mapping[str, str] | None = None,
    tape: Path | None = None,
    activations: bool = False,
    watch: Callable[[int, Tensor], None] | None = None,
    ignore_memory: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Draw samples and store them in a zarr group in the run folder.

    Args:
        run: The opened run folder.
        request: Number, length, seed and conditions of the samples.
        trajectory: True to store the tokens after every sampler step, too, and their confidences where the process has them.
        name: Name of the zarr group; if it exists, a number is added (``samples-2.zarr``).
        notes: Additional attributes of the group.
        tape: Path of a tape to write, with which ``sedd-graph restore`` repeats the run; None for none. Requires a seed
            and no prompt.
        activations: True to write the saved activations beside the tape (:func:`sedd_graph.runs.activations.recording`).
        watch: Callback of the sampler's steps, as :attr:`SampleRequest.on_step`; None for none.
        ignore_memory: True to print a warning instead of raising an error if the request needs more memory than there
            is.
        say: Function that prints a line for the user: for a long request its estimated time and memory, then the
            samples (of points only the first 16).

    Returns:
        The path of the group.

    Raises:
        UserError: The process does not support the request, the request does not fit into memory, a run with text has no
            tokenizer, or a tape is to be written of a network in bfloat16.
        EnvironmentFault: The run folder cannot be written.
    """
    process = run.engine.process
    if not os.access(run.path, os.W_OK):
        raise EnvironmentFault(f"{run.path} is read-only, so samples cannot be stored in it: copy it to another place")
    if process.trains:
        require_sampling_memory(run, request, trajectory=trajectory, ignore=ignore_memory, say=say)
    require_free(tape)
    if tape is not None and run.engine.network.dtype != torch.float32:
        raise UserError("sample: a tape is of a network in float32: leave --dtype out")
    steps = process.evaluations(request)
    frames, confidences, marks = Frames(steps, np.int32), Frames(steps, np.uint8), Marks()
    tokenizer = run.text_tokenizer() if process.text else None

    def on_step(number: int, rows: Tensor) -> None:
        if number:  # the first rows are noise
            advance()
        if watch is not None:
            watch(number, rows)
        if trajectory:
            frames.append(rows.cpu().numpy())
        if tape is not None:
            marks.add(rows)

    def on_confidence(number: int, sure: Tensor) -> None:
        confidences.append(quantised(sure).cpu().numpy())

    conditions = process.conditions({}) if request.conditions is None else request.conditions
    many = conditions is not None and conditions.particles > 1  # most of their rows are not returned
    if trajectory or watch is not None or ("on_step" not in process.refuses and not many):
        request = dataclasses.replace(request, on_step=on_step)
    if trajectory and "on_confidence" not in process.refuses:
        request = dataclasses.replace(request, on_confidence=on_confidence)
    with recording(run, tape if activations else None) as recorder:
        with (
            progress("sampling", total=process.evaluations(request)) as advance,
            observed(recorder, range(request.batch), process.positions(request)),
        ):
            samples = run.engine.generate(request)
        stored = process.stored(samples, tokenizer)
        if tape is not None:
            marks.add(samples.rows)
            _write_tape(run, request, tape, marks, samples.facts.get("mask"))
    if recorder is not None:
        say(f"activations of {recorder.records:,} evaluations of the network in {recorder.path}")
    for number, text in enumerate(run.decode(samples.rows)):  # before they are stored, which a full disk may prevent
        say(f"--- {number}\n{text}")
    return write_samples(
        run.path / name,
        stored.arrays,
        text=stored.text,
        trajectory=frames.array(),
        confidence=confidences.array(),
        attributes={
            **sampling_attributes(run, request, samples.facts),
            **({} if request.prompt is None else {"prompt": request.prompt.tolist()}),
            **(notes or {}),
        },
    )


def sampling_attributes(run: Run, request: SampleRequest, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of stored samples: what they were drawn with, as JSON values by name.

    Args:
        run: The opened run folder.
        request: The request.
        facts: Facts of the samples (:attr:`Samples.facts`).
    """
    steps, tokenizer = request.steps or run.engine.process.steps, run.tokenizer if run.engine.process.text else None
    return {
        "sampler": run.plan.sampler_op,
        "settings": run.plan.sampling(),
        **({} if steps is None else {"steps": steps}),
        "seed": request.seed,
        "weights": run.weights,
        "revision": revision(),
        "blueprint": run.digest,
        "device": str(run.engine.device),
        "dtype": dtype_name(run),
        **facts,
        **({} if tokenizer is None else {"pad": tokenizer.pad, "end": tokenizer.end}),
    }


def _write_tape(run: Run, request: SampleRequest, tape: Path, marks: Marks, mask: int | None) -> None:
    """Write the tape of samples: the request, and the hashes of the rows after every step."""
    if request.seed is None or request.prompt is not None or request.classifier is not None:
        raise UserError("sample: a tape needs a seed, and no prompt and no classifier of the request")
    facts = facts_of(
        run,
        kind="samples",
        seed=request.seed,
        batch=request.batch,
        length=request.length,
        mask=mask,
        **sampling_facts(run, request),
    )
    write_tape(tape, Tape(facts=facts, arrays={"marks": marks.array()}), numbers=False)


def read_prompt(run: Run, text: TextWithHoles, *, observed: str) -> Prompt:
    """Encode text with holes as a prompt of tokens for infilling.

    Args:
        run: The opened run folder.
        text: The text, with one or more holes that the model fills in: ``[[N]]`` is a hole of N tokens, ``[[]]`` a hole
            of any size for a model that chooses lengths; or a prefix and a suffix with a hole between them.
        observed: Input of the network at given tokens: ``clamp`` (the clean tokens) or ``renoise`` (noised again at
            each step), as in :class:`~sedd_graph.diffusion.conditions.conditions.Conditions`.

    Returns:
        The prompt. ``tokens``, int64 [1, l], has the given token ids, and -1 at each position to fill in (one -1 for a
        hole ``[[]]``). ``length`` is the number of tokens of each sample, or the largest number if the model chooses
        it.

    Raises:
        UserError: The process cannot fill in this text, or the run has no tokenizer.
    """
    data, tokenizer = run.report.data, run.text_tokenizer()
    prompts_trained = isinstance(data, DataConfig) and data.corpus.prompted
    return run.engine.process.prompt(
        text, tokenizer, length=data.length, prompts_trained=prompts_trained, observed=observed
    )
