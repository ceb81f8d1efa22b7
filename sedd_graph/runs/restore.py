"""Subcommand ``restore``: return from the noise of a tape to its texts."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sedd_graph.component.progress import progress
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.engine.samples import SampleRequest
from sedd_graph.errors import UserError
from sedd_graph.runs.activations import Recorder, observed
from sedd_graph.runs.invert import restore_run
from sedd_graph.runs.noise import denoise_run
from sedd_graph.runs.open import Run
from sedd_graph.runs.tape import Marks, require_same
from sedd_graph.store.manifest import DamagedError
from sedd_graph.store.tape import Tape

__all__ = ["restored_texts"]


def restored_texts(run: Run, tape: Tape, *, where: Path, recorder: Recorder | None = None) -> list[str]:
    """Return the texts of a tape of any kind (for a flow, its points as text).

    Args:
        run: The opened run folder.
        tape: The tape.
        where: Path of the tape, for error messages.
        recorder: Recorder of activations; None: none are recorded.

    Raises:
        UserError: The run folder has another model than the tape was written with.
        DamagedError: The rows after a step are not those that were recorded.
    """
    if tape.facts.kind != "samples":
        if tape.facts.kind == "noise" and recorder is not None:
            raise UserError(f"--activations: {where} is of noise by the kernel, which evaluates no network")
        tokenizer = run.text_tokenizer()
        if tape.facts.kind == "noise":
            return [tokenizer.decode(tokens) for tokens in denoise_run(run, tape, where=where)]
        return [tokenizer.decode(tokens) for tokens in restore_run(run, tape, where=where, recorder=recorder)]
    return _samples(run, tape, where, recorder)


def _samples(run: Run, tape: Tape, where: Path, recorder: Recorder | None) -> list[str]:
    """Draw the samples of a tape again, and compare every step."""
    require_same(tape.facts, run, where)
    facts, process = tape.facts, run.engine.process
    marks, trial = (
        Marks(tape.arrays["marks"], where, facts),
        SampleRequest(batch=1, length=facts.length, steps=facts.steps),
    )
    with (
        progress("restoring", total=process.evaluations(trial)) as advance,
        observed(recorder, range(facts.batch), process.positions(trial)),
    ):

        def on_step(number: int, rows: Tensor) -> None:
            marks.add(rows)
            if number:
                advance()

        try:
            conditions = Conditions.model_validate_json(facts.conditions) if facts.conditions else None
        except ValueError:
            raise DamagedError(f"{where}: attribute tape.conditions: not the conditions of samples") from None
        request = SampleRequest(
            batch=facts.batch,
            length=facts.length,
            steps=facts.steps if process.steps is not None else None,
            seed=facts.seed,
            conditions=conditions,
            on_step=None if len(tape.arrays["marks"]) == 1 or "on_step" in process.refuses else on_step,
        )
        made = run.engine.generate(request)
    marks.add(made.rows)
    marks.array()
    return run.decode(made.rows)
