"""Noise tapes of run folders: what a tape repeats, in which parts, and whether a run folder is the one that it needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedd_graph.engine.process import SampleRequest
from sedd_graph.errors import UserError
from sedd_graph.runs.open import Run
from sedd_graph.store.manifest import DamagedError
from sedd_graph.store.tape import MARK, TapeFacts

__all__ = ["INVERTED", "Marks", "Part", "canonical", "facts_of", "parts_of", "require_same", "run_of"]

Array = npt.NDArray[Any]
INVERTED = "tape.zarr"
"""File name, in a run folder, of a tape."""


def canonical(value: object) -> str:
    """Return a JSON value as text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _weights_digest(run: Run) -> str:
    """Return the SHA-256 of the weights of a run, with their names, shapes and dtypes."""
    found = hashlib.sha256()
    for name, value in sorted(run.engine.model.state_dict().items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _dtypes(run: Run) -> str:
    found = {str(p.dtype).removeprefix("torch.") for p in run.engine.model.parameters()}
    return " and ".join(sorted(found)) or "none"


def _parts(run: Run) -> dict[str, str]:
    """Return the components of the process of a run, as canonical JSON by role."""
    plan = run.plan
    return {
        **{role: canonical(value) for role, value in plan.record().items()},
        "sampler": canonical({"op": plan.sampler_op, **plan.sampling()}),
    }


def facts_of(run: Run, request: SampleRequest, **fields: Any) -> TapeFacts:
    """Return the facts of a tape.

    Args:
        run: The run folder.
        request: The request whose samples the tape repeats. Its ``steps`` may be None for the sampler's own.
        **fields: The fields of :class:`TapeFacts` that do not follow from these.
    """
    conditions = "" if request.conditions is None else canonical(request.conditions.model_dump(mode="json"))
    return TapeFacts(
        weights=_weights_digest(run),
        weights_file=run.weights,
        dtype=_dtypes(run),
        parts=_parts(run),
        blueprint=run.digest,
        conditions=conditions,
        steps=request.steps or run.engine.process.steps,
        device=run.engine.device.type,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        **fields,
    )


def require_same(facts: TapeFacts, run: Run, where: Path) -> None:
    """Verify that a run folder has the model that a tape was written with.

    Args:
        facts: The facts of the tape.
        run: The run folder.
        where: The tape, for the error message.

    Raises:
        UserError: It has another process, dtype, weights or blueprint. The message names the first difference.
    """
    parts = _parts(run)
    for role in sorted({*facts.parts, *parts}):
        if facts.parts.get(role) != parts.get(role):
            raise UserError(
                f"{where} was written with the {role} {_short(facts.parts.get(role))}; {run.path} has "
                f"{_short(parts.get(role))}: a tape needs the one that it was written with"
            )
    for name, own, advice in (
        ("dtype of the weights", _dtypes(run), "give the run folder that the tape was written with"),
        ("weights", _weights_digest(run), f"give --weights or the run folder with {facts.weights_file}"),
        ("blueprint", run.digest, "give the run folder that the tape was written with"),
    ):
        held = {"dtype of the weights": facts.dtype, "weights": facts.weights, "blueprint": facts.blueprint}[name]
        if held != own:
            raise UserError(
                f"{where} was written with another model: the {name} of {run.path} is {own[:16]}, not {held[:16]}: {advice}"
            )


def _short(part: str | None) -> str:
    return "none" if part is None else part if len(part) < 400 else part[:400] + "..."


def run_of(tape: Path, run: str | Path | None) -> Path:
    """Return the run folder of a tape: the one given, or else the folder that holds the tape.

    Raises:
        UserError: No run folder is given, and the tape is in none.
    """
    if run is not None:
        return Path(run)
    folder = tape.resolve().parent
    if not (folder / "blueprint.lock.yaml").is_file():
        raise UserError(f"{tape} is in no run folder: give --run, the run folder that it was written with")
    return folder


class Part(NamedTuple):
    """Rows of a tape that are drawn together, since they have equally many tokens.

    Attributes:
        rows: Indices of the rows on the tape, in order.
        length: Number of tokens of each.
    """

    rows: tuple[int, ...]
    length: int


def parts_of(lengths: npt.NDArray[np.int64], batch: int) -> list[Part]:
    """Return the parts of a tape: rows of equal length, at most ``batch`` together, short ones first; none of length 0."""
    found: list[Part] = []
    for length in np.unique(lengths[lengths > 0]).tolist():
        rows = np.flatnonzero(lengths == length).tolist()
        found += [Part(tuple(rows[i : i + batch]), length) for i in range(0, len(rows), batch)]
    return found


class Marks:
    """Hashes of the rows after every step, recorded or compared.

    Args:
        expected: Hashes of the recorded run, uint8 [f, 16]; None to record.
        where: The tape, for the error message.
        facts: Facts of the tape, for the error message; None to record.
    """

    def __init__(
        self, expected: Array | None = None, where: Path | None = None, facts: TapeFacts | None = None
    ) -> None:
        self._expected, self._where, self._facts = expected, where, facts
        self._found: list[bytes] = []

    def add(self, rows: Tensor) -> None:
        """Record or compare the rows after one step, [b, ...].

        Raises:
            DamagedError: They are not the recorded ones.
        """
        data = rows.detach().cpu().contiguous().numpy()
        found = hashlib.sha256(f"{data.dtype.str} {data.shape}".encode() + data.tobytes()).digest()[:MARK]
        number = len(self._found)
        self._found.append(found)
        if self._expected is None:
            return
        if number >= len(self._expected) or self._expected[number].tobytes() != found:
            raise DamagedError(self._difference(number))

    def _difference(self, number: int) -> str:
        message = f"{self._where} cannot be repeated here: rows {number} of the run differ from the recorded ones. "
        now = {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
        facts = self._facts
        if facts is None:
            return message
        held = {"threads": facts.threads, "torch": facts.torch}
        apart = [f"{name} {held[name]} (here {now[name]})" for name in held if held[name] != now[name]]
        reason = "It was written on " + facts.device + (" with " + ", ".join(apart) if apart else "")
        return (
            message + reason + "; logits that differ in their last bits can change a token: repeat it as it was written"
        )

    def array(self) -> npt.NDArray[np.uint8]:
        """Return the hashes, uint8 [f, 16].

        Raises:
            DamagedError: There are fewer than expected.
        """
        if self._expected is not None and len(self._found) != len(self._expected):
            raise DamagedError(self._difference(len(self._found)))
        return np.frombuffer(b"".join(self._found), dtype=np.uint8).reshape(-1, MARK)


def starts(lengths: npt.NDArray[np.int64]) -> Iterator[slice]:
    """Yield the slice of each row in an array of all rows one after another."""
    ends = lengths.cumsum()
    for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
        yield slice(end - length, end)


Say = Callable[[str], None]
Columns = Mapping[str, Array]
