"""Subcommand ``eval``: compute an upper bound on -log p (exact for flows) of held-out rows under a run's model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.engine.hardware import describe_hardware
from sedd_graph.errors import SeddGraphError
from sedd_graph.evaluation.bound import Result, evaluate
from sedd_graph.evaluation.paired import ROWS_FILE
from sedd_graph.runs.open import Run, open_run
from sedd_graph.runs.precision import choose_dtype, dtype_name
from sedd_graph.runs.provenance import revision
from sedd_graph.store.files import read_json, write_json
from sedd_graph.training.config import TrainConfig
from sedd_graph.training.distributed import World

__all__ = ["Compile", "Table", "compile_evaluation", "evaluate_opened", "evaluate_run"]

Compile = Literal["auto", "block", "off"]
"""Whether an evaluation is compiled, see :func:`compile_evaluation`."""
ROWS = 64
"""Largest number of held-out rows whose noise levels are drawn together."""
REPAID = 100
"""Number of evaluations of a network that repay the time of compiling it for them."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Protocol of a published table, for the record of an evaluation.

    Attributes:
        name: Its name, which the file ``evaluation-<name>.json`` has.
        facts: What it is, and what was read, as JSON values.
    """

    name: str
    facts: Mapping[str, Any]


def evaluate_opened(
    run: Run,
    data: Dataset | PointData,
    say: Callable[[str], None],
    *,
    batches: int | None = None,
    draws: int | None = None,
    table: Table | None = None,
    world: World | None = None,
) -> Result:
    """Compute an upper bound on -log p of held-out rows under an opened run, print it, and write ``evaluation.json``.

    For a flow the result is the exact -log p. An existing ``evaluation.json`` is not replaced if it covers more rows.

    Args:
        run: The opened run folder.
        data: The data set of the run.
        say: Function that prints a line for the user.
        batches: Number of batches of held-out rows, selected at even distances; None evaluates all.
        draws: Number of noise draws per row; None takes ``train.evaluate.draws`` of the blueprint, or 1 if it has no
            ``train.evaluate``.
        table: Protocol by which the rows were made; the result is written to a file of its own. None for the run's own
            held-out rows.
        world: The processes that share the evaluation, all of which call this function; the first writes the file.

    Returns:
        The bound, or for a flow -log p, in nats and bits, with its standard errors and sample sizes.
    """
    config, objective = run.report.train, run.plan.objective_op  # raises for a graph without a process
    draws = draws or (config.evaluate.draws if config.evaluate else 1)
    world = world or World.single()
    rows = min(ROWS, config.batch)
    at_once = min(rows, _micro_batch(config, world))
    found = evaluate(
        run.engine,
        data,
        rows=rows,
        batches=batches,
        draws=draws,
        seed=config.seed,
        at_once=at_once,
        workers=world,
    )
    if world.rank:
        return found
    say(f"held-out {found}")
    if (caveat := run.engine.process.caveat) is not None:
        say(f"note        {caveat}")
    if baselines := data.baselines():
        say(
            f"unigram entropy of the same text: {baselines['heldout_entropy_bits']:.4f} bits per character "
            f"({baselines['unigram_bits']:.4f} under the training text's frequencies)"
        )
    chosen = run.engine.process.likelihood if table is None else table.name
    path = run.path / ("evaluation.json" if chosen == "bound" else f"evaluation-{chosen}.json")
    fuller = _rows_of(path, say)
    if fuller > found.count:
        say(f"{path.name} is not replaced: it covers {fuller} rows, this evaluation only {found.count}")
        return found
    protocol = {
        **run.plan.record(),
        "data": data.record(),
        "blueprint": run.digest,
        "rows_at_a_time": at_once,
        "rows_drawn_together": rows,
        "batches": batches,
        "draws": draws,
        "seed": config.seed,
        "dtype": dtype_name(run),
        "hardware": describe_hardware(run.engine.device),
        "revision": revision(),
        **({} if table is None else {"table": table.facts}),
    }
    record = {**dataclasses.asdict(found), **baselines, "weights": run.weights, "objective": objective}
    each = {name: record.pop(name) for name in ("row_nats", "row_tokens")}
    write_json(path, {**record, "protocol": protocol})
    if chosen == "bound":
        write_json(run.path / ROWS_FILE, {"protocol": protocol, **each})
    return found


def _micro_batch(config: TrainConfig, world: World) -> int:
    """Return the number of rows that training evaluates at a time on each process."""
    return max(1, config.batch // (config.accumulate * world.size))


def _rows_of(path: Path, say: Callable[[str], None]) -> int:
    """Return the number of rows that ``evaluation.json`` covers; 0 if there is none, or if it is damaged."""
    if not path.exists():
        return 0
    try:
        found = read_json(path)
        rows = max(found.get("sequences", 0), found.get("rows", 0)) if isinstance(found, dict) else None
    except (SeddGraphError, TypeError) as error:
        rows = None
        say(f"warning     {error}")
    if not isinstance(rows, int):
        say(f"warning     {path} is damaged, and is replaced")
        return 0
    return rows


def evaluate_run(
    path: Path,
    *,
    device: torch.device,
    batches: int | None,
    draws: int,
    weights: str,
    say: Callable[[str], None],
    corpus: Path | None = None,
    likelihood: str = "bound",
    dtype: str | None = None,
    compile: Compile = "auto",
) -> Result:
    """Open a run folder and compute an upper bound on -log p of its held-out rows, as :func:`evaluate_opened` does.

    Args:
        path: The run folder.
        device: Device of the network.
        batches: Number of batches of held-out rows, selected at even distances; None evaluates all.
        draws: Number of noise draws per row, at least 1. ``train.evaluate.draws`` of the blueprint is not used.
        weights: Weights to evaluate: ``newest``, ``model`` or ``fresh``, as in :func:`sedd_graph.runs.open.open_run`.
        say: Function that prints a line for the user.
        corpus: Folder to which file names of the data are relative, if it has moved since the run was built.
        likelihood: The likelihood to compute, one of the process's
            (:attr:`sedd_graph.engine.process.Process.likelihoods`). Another than ``bound`` is written to
            ``evaluation-NAME.json``, beside that of the bound.
        dtype: Precision of the network (:func:`sedd_graph.runs.precision.choose_dtype`).
        compile: Whether the blocks of the network are compiled (:func:`compile_evaluation`).

    Returns:
        The bound, or for a flow -log p, in nats and bits, with its standard errors and sample sizes.

    Raises:
        UserError: ``path`` is not a run folder, or its blueprint has no ``data`` section or no diffusion process.
    """
    with contextlib.ExitStack() as stack:
        world = World.from_environment(device)
        stack.callback(world.close)
        say = say if world.rank == 0 else (lambda text: None)
        run = open_run(path, device=device, compile="off", weights=weights, root=corpus)
        run.engine.process.choose_likelihood(likelihood)
        choose_dtype(run, dtype)
        say(f"weights     {run.weights}")
        data = run.data()
        if (changed := run.changed(data)) is not None:
            say(f"warning     {changed}: the bound is that of the changed corpus")
        compile_evaluation(run, compile, data, batches=batches, draws=draws)
        return evaluate_opened(run, data, say, batches=batches, draws=draws, world=world)


def compile_evaluation(
    run: Run, mode: Compile, data: Dataset | PointData, *, batches: int | None, draws: int | None
) -> None:
    """Compile the network of a run for an evaluation.

    Args:
        run: The opened run folder.
        mode: ``block``: each repeated block; ``off``: nothing; ``auto``: ``block`` on a GPU, if there are at least
            :data:`REPAID` evaluations of the network, which repay the time of compiling.
        data: The rows.
        batches: Number of batches; None for all.
        draws: Number of noise draws per row; None for 1.
    """
    rows = sum(map(len, data.held_out_batches(min(ROWS, run.report.train.batch), batches=batches)))
    repaid = rows * (draws or 1) >= REPAID * min(ROWS, _micro_batch(run.report.train, World.single()))
    if mode == "block" or (mode == "auto" and run.engine.device.type == "cuda" and repaid):
        run.engine.compile("block", everywhere=True)
