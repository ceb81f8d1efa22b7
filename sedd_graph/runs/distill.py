"""Subcommand ``distill``: make a run whose model needs few sampler steps out of a trained run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sedd_graph.blueprint.schema import MAX_NAME
from sedd_graph.errors import UserError
from sedd_graph.runs.build import build_run
from sedd_graph.runs.check import LOCK
from sedd_graph.runs.open import open_run

__all__ = ["SUFFIX", "build_student"]

SUFFIX = "-distilled"
"""End of the name of a student, behind that of its teacher."""


def build_student(
    path: Path,
    overrides: Sequence[str],
    *,
    runs: Path,
    device: torch.device,
    ignore_memory: bool = False,
    corpus: Path | None = None,
    say: Callable[[str], None],
) -> Path:
    """Write the run folder of a student, which starts from the weights of a trained run and is trained against it.

    The student has the blueprint of the teacher with overrides, and its data and tokenizer. Its section ``distill`` declares
    the objective; without one it is ``consistency``.

    Args:
        path: The run folder of the teacher.
        overrides: Changes to its blueprint as ``key=value``, such as ``distill.rounds=5`` or ``train.budget_s=600``.
        runs: Folder in which the run folder is created.
        device: Device on which the run is verified and a step is tried.
        ignore_memory: True to print a warning instead of raising an error if training needs more memory than there is.
        corpus: Folder of the data's files, if it has moved since the teacher was built.
        say: Function that prints a line for the user.

    Returns:
        The path of the new run folder.

    Raises:
        BlueprintError: The blueprint with the overrides is not valid, or its process cannot be distilled.
        UserError: ``path`` is no run folder with trained weights, or a verification fails.
    """
    teacher = open_run(path, device=torch.device("cpu"), compile="off", root=corpus)
    _ = teacher.plan.objective_op  # raises for a graph without a process
    if teacher.weights == "fresh":
        raise UserError(
            f"{path} has not been trained: there is no teacher to distil; train it with `sedd-graph train {path}`"
        )
    own = list(overrides)
    keys = {override.partition("=")[0].strip() for override in own}
    if teacher.report.distillation is None and not keys & {"distill", "distill.op"}:
        own.insert(0, "distill.op=consistency")
    if "name" not in keys and not teacher.report.name.endswith(SUFFIX):
        own.append(f"name={teacher.report.name[: MAX_NAME - len(SUFFIX)]}{SUFFIX}")
    return build_run(
        path / LOCK,
        own,
        runs=runs,
        device=device,
        compile=None,
        proof="quick",
        ignore_memory=ignore_memory,
        teacher=teacher,
        say=say,
    )
