"""Subcommands ``sample`` and ``infill``: draw samples from the model of a run folder, and store them there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sedd_graph.component.progress import progress
from sedd_graph.data.config import DataConfig
from sedd_graph.engine.process import Prompt, SampleRequest, TextWithHoles
from sedd_graph.runs.open import Run
from sedd_graph.runs.provenance import revision
from sedd_graph.store.arrays import write_samples

__all__ = ["read_prompt", "sample_run"]


def sample_run(
    run: Run,
    request: SampleRequest,
    *,
    trajectory: bool = False,
    name: str = "samples.zarr",
    notes: Mapping[str, str] | None = None,
) -> tuple[list[str], Path]:
    """Draw samples and store them in a zarr group in the run folder.

    Args:
        run: The opened run folder.
        request: Number, length, seed and conditions of the samples.
        trajectory: True to store the tokens after every sampler step, too.
        name: Name of the zarr group; if it exists, a number is added (``samples-2.zarr``).
        notes: Additional attributes of the group.

    Returns:
        One text per sample, and the path of the group.

    Raises:
        UserError: The process does not support the request, or a run with text has no tokenizer.
    """
    process, frames = run.engine.process, list[npt.NDArray[np.int32]]()
    tokenizer = run.text_tokenizer() if process.text else None

    def on_step(number: int, rows: Tensor) -> None:
        if number:  # the first rows are noise
            advance()
        if trajectory:
            frames.append(rows.cpu().numpy().astype(np.int32))

    if trajectory or "on_step" not in process.refuses:
        request = dataclasses.replace(request, on_step=on_step)
    with progress("sampling", total=process.evaluations(request)) as advance:
        samples = run.engine.generate(request)
    stored = process.stored(samples, tokenizer)
    where = write_samples(
        run.path / name,
        stored.arrays,
        text=stored.text,
        trajectory=np.stack(frames) if frames else None,
        attributes={
            "sampler": run.plan.sampler_op,
            **({} if (steps := request.steps or process.steps) is None else {"steps": steps}),
            "seed": request.seed,
            "weights": run.weights,
            "revision": revision(),
            "blueprint": run.digest,
            "device": str(run.engine.device),
            **samples.facts,
            **({} if tokenizer is None else {"pad": tokenizer.pad, "end": tokenizer.end}),
            **({} if request.prompt is None else {"prompt": request.prompt.tolist()}),
            **(notes or {}),
        },
    )
    return run.decode(samples.rows), where


def read_prompt(run: Run, text: TextWithHoles, *, observed: str) -> Prompt:
    """Encode text with holes as a prompt of tokens for infilling.

    Args:
        run: The opened run folder.
        text: The text, with one or more holes that the model fills in.
        observed: Input of the network at given tokens: ``clamp`` (the clean tokens) or ``renoise`` (noised again at
            each step), as in :class:`~sedd_graph.diffusion.conditions.conditions.Conditions`.

    Returns:
        The prompt: tokens, int64 [1, l], with -1 in the holes, and the length of the samples.

    Raises:
        UserError: The process cannot fill in this text, or the run has no tokenizer.
    """
    data, tokenizer = run.report.data, run.text_tokenizer()
    prompts_trained = isinstance(data, DataConfig) and data.corpus.prompted
    return run.engine.process.prompt(
        text, tokenizer, length=data.length, prompts_trained=prompts_trained, observed=observed
    )
