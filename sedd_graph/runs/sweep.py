"""Sweep: one run for every combination of values of keys of a blueprint, in a folder of its own, which can be resumed.

The grid is data: ``sweep.json`` lists the cases. Case N is built and trained in the folder ``N`` by a process of its own,
which locks that folder, and writes ``done.json`` when training has ended. However often a sweep is killed and started
again, a case has one run folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated

import pydantic
import torch

from sedd_graph.component.strict import Strict
from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.runs.build import build_run
from sedd_graph.runs.check import check, digest, lock_text
from sedd_graph.runs.summary import Summary, find_runs, summarise
from sedd_graph.runs.train import train_run
from sedd_graph.store.durable import make_folder
from sedd_graph.store.files import alone, open_to_append, read_json, write_json

__all__ = ["Grid", "Sweep", "open_sweep", "python_command", "read_grid", "run_case", "run_sweep", "slurm_script"]

CASES = 4096
"""Largest number of cases."""
PLAN, DONE, LOG = "sweep.json", "done.json", "log.txt"
_WAIT_S = 1.0
"""Time between two looks at a case that another process still runs, seconds."""
_STOPPED = {130, 143, 129, 138}
"""Exit codes of a training that a signal has stopped."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Values of keys.

    Attributes:
        axes: Values to combine, by key.
        fixed: Overrides that all cases share, as ``key=value``.
    """

    axes: Mapping[str, Sequence[str]]
    fixed: Sequence[str]

    def cases(self) -> list[list[str]]:
        """Return the overrides of each case; the values of the last key change fastest."""
        chosen = itertools.product(*([f"{key}={value}" for value in values] for key, values in self.axes.items()))
        return [[*self.fixed, *case] for case in chosen]


class _Case(Strict):
    """One case in ``sweep.json``."""

    overrides: Annotated[list[str], pydantic.Field(max_length=1000)]
    blueprint: Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{16}$")]


class _Plan(Strict):
    """The content of ``sweep.json``."""

    cases: Annotated[list[_Case], pydantic.Field(max_length=CASES)]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep in its folder.

    Attributes:
        folder: The folder.
        blueprint: The blueprint file.
        grid: The grid.
    """

    folder: Path
    blueprint: Path
    grid: Grid

    def case_folder(self, number: int) -> Path:
        """Return the folder of a case."""
        return self.folder / f"{number:04d}"

    def summary(self, number: int) -> Summary | None:
        """Return the summary of the run of a case; None if it is not built."""
        found = next(find_runs(self.case_folder(number)), None)
        return None if found is None else summarise(found)

    def is_done(self, number: int) -> bool:
        """Return whether the training of a case has ended."""
        return (self.case_folder(number) / DONE).is_file()


def read_grid(overrides: Sequence[str]) -> Grid:
    """Read ``key=value`` and ``key=a,b,c``. A comma inside of brackets, braces or quotes separates nothing.

    Raises:
        UserError: An override has no key or an empty value, a key is repeated, or there are too many cases.
    """
    axes: dict[str, list[str]] = {}
    fixed, keys, count = [], set[str](), 1
    for text in overrides:
        key, equals, rest = text.partition("=")
        values = _split(rest)
        if not equals or not key or not all(values):
            raise UserError(f"{text!r}: give key=value, or key=a,b,c for one case of each value")
        if key in keys:
            raise UserError(f"{key} is given twice: give all its values at once, {key}=a,b,c")
        keys.add(key)
        if len(values) == 1:
            fixed.append(text)
            continue
        if len(set(values)) < len(values):
            raise UserError(f"{text!r} has the same value twice")
        axes[key] = values
        count *= len(values)
    if not axes:
        raise UserError("a sweep needs a key with two or more values, such as train.batch=16,32")
    if count > CASES:
        raise UserError(f"{count:,} cases are more than {CASES:,}")
    return Grid(axes, fixed)


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and not depth:
            parts.append("")
            continue
        parts[-1] += char
    return [part.strip() for part in parts]


def open_sweep(blueprint: Path, overrides: Sequence[str], folder: Path | None, *, only: int | None = None) -> Sweep:
    """Check the cases of a sweep, and open its folder.

    Args:
        blueprint: The blueprint file.
        overrides: The grid (:func:`read_grid`).
        folder: Folder of the sweep; None: ``sweeps/NAME-DIGEST``, which the blueprint and the grid determine.
        only: Number of the one case to check, in a folder that exists; None: all.

    Raises:
        BlueprintError: A case is not valid.
        UserError: The grid is not valid, there is no such case, or the folder is that of another sweep.
    """
    grid = read_grid(overrides)
    cases = grid.cases()
    if only is not None and only >= len(cases):
        raise UserError(f"there is no case {only}: the sweep has {len(cases)}, from 0")
    known = None if folder is None else _read_plan(folder)
    checked, name = dict[int, str](), ""
    for number in range(len(cases)) if only is None or known is None else [only]:
        report = check(blueprint, cases[number])
        checked[number], name = digest(lock_text(report)), report.name
    if folder is None:
        folder = Path("sweeps") / f"{name}-{digest(json.dumps([*checked.values()]))[:8]}"
        known = _read_plan(folder)
    if known is None:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty, and no sweep: choose another one (-o)")
        make_folder(folder)
        plan = _Plan(cases=[_Case(overrides=c, blueprint=checked[n]) for n, c in enumerate(cases)])
        write_json(folder / PLAN, plan.model_dump())
    elif len(known.cases) != len(cases) or any(known.cases[n].blueprint != d for n, d in checked.items()):
        raise UserError(f"{folder} is the folder of another sweep: its cases differ; choose another one (-o)")
    return Sweep(folder, blueprint, grid)


def _read_plan(folder: Path) -> _Plan | None:
    """Return the content of ``sweep.json``; None if there is none."""
    path = folder / PLAN
    if not path.exists():
        return None
    try:
        return _Plan.model_validate(read_json(path))
    except pydantic.ValidationError as error:
        raise UserError(f"{path} is damaged: {error.errors()[0]['msg']}") from error


def run_case(sweep: Sweep, number: int, *, device: torch.device, say: Callable[[str], None]) -> str:
    """Build and train one case, or resume it; do nothing if it is done.

    Returns:
        The reason for which training ended: ``done``, ``budget``, or the name of the signal that stopped it.

    Raises:
        UserError: The blueprint or the data are not valid.
    """
    cases, folder = sweep.grid.cases(), sweep.case_folder(number)
    make_folder(folder)
    with _waiting(folder, say):
        if sweep.is_done(number):
            return "done"
        path = next(find_runs(folder), None)
        if path is None:
            path = build_run(sweep.blueprint, cases[number], runs=folder, device=device, compile="off", say=say)
        result, _ = train_run(path, resume=None, device=device, say=say)
        if result.reason in ("done", "budget"):
            write_json(folder / DONE, {"step": result.step, "run": str(path.relative_to(folder))})
        return result.reason


@contextlib.contextmanager
def _waiting(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Lock the folder of a case in the context, after waiting for the process of a killed sweep that still runs it."""
    open_to_append(folder / ".lock").close()  # raises what waiting would not change
    with contextlib.ExitStack() as stack:
        said = False
        while True:
            try:
                stack.enter_context(alone(folder, "running"))
                break
            except UserError as error:
                if not said:
                    say(f"{error}: waiting")
                said = True
                time.sleep(_WAIT_S)
        yield


def run_sweep(
    sweep: Sweep, command: Callable[[int], Sequence[str]], *, jobs: int, say: Callable[[str], None]
) -> list[int]:
    """Run all cases that are not done, ``jobs`` at a time, each in a process of its own.

    Args:
        sweep: The sweep.
        command: Function that returns the command line that runs a case.
        jobs: Number of processes at a time. They share the processors, and take the GPUs in turn.
        say: Function that prints a line for the user.

    Returns:
        The numbers of the cases that failed.

    Raises:
        EnvironmentFault: A signal stopped a case; the sweep can be started again.
    """
    open_cases = [n for n in range(len(sweep.grid.cases())) if not sweep.is_done(n)]
    failed, slots = [], list(range(jobs))
    gpus = torch.cuda.device_count() if jobs > 1 else 0

    def start(number: int, slot: int) -> tuple[int, int, int]:
        folder = sweep.case_folder(number)
        make_folder(folder)
        environment = dict(os.environ)
        if gpus > 1:
            environment.setdefault("CUDA_VISIBLE_DEVICES", str(slot % gpus))
        if jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        with (folder / LOG).open("ab") as log:
            code = subprocess.run(command(number), stdout=log, stderr=log, env=environment, check=False).returncode
        return number, slot, code

    running: set[Future[tuple[int, int, int]]] = set()
    with ThreadPoolExecutor(jobs) as pool:
        while open_cases or running:
            while open_cases and slots:
                number = open_cases.pop(0)
                say(f"case {number:<4} {' '.join(sweep.grid.cases()[number][len(sweep.grid.fixed) :])}")
                running.add(pool.submit(start, number, slots.pop(0)))
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                number, slot, code = future.result()
                slots.append(slot)
                if code in _STOPPED or code < 0:
                    open_cases.clear()
                    if not running:
                        raise EnvironmentFault(f"case {number} was stopped; the same command goes on with the sweep")
                    continue
                if code:
                    failed.append(number)
                    say(f"case {number:<4} failed (exit code {code}): see {sweep.case_folder(number) / LOG}")
                elif (found := sweep.summary(number)) is not None and found.bits is not None:
                    say(f"case {number:<4} {found.bits:.4f} bits per {found.unit}")
    return sorted(failed)


def slurm_script(sweep: Sweep, command: Sequence[str]) -> str:
    """Return a batch script for Slurm that runs each case as a task of a job array.

    Args:
        sweep: The sweep.
        command: Command line of one case, without its number.
    """
    last = len(sweep.grid.cases()) - 1
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --job-name={shlex.quote(sweep.folder.name)}",
            f"#SBATCH --array=0-{last}",
            f"#SBATCH --output={shlex.quote(str(sweep.folder.resolve() / 'slurm-%a.log'))}",
            "#SBATCH --requeue",
            f'{shlex.join(command)} --case "$SLURM_ARRAY_TASK_ID"',
        ]
    )


def python_command() -> list[str]:
    """Return the command line that runs this package with the same interpreter."""
    return [sys.executable, "-m", "sedd_graph"]
