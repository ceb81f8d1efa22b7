"""Noise tapes of run folders: what a tape repeats, in which parts, and whether a run folder is the one that it needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.engine.process import KERNEL, SCHEDULE
from sedd_graph.engine.samples import SampleRequest
from sedd_graph.errors import UserError
from sedd_graph.runs.open import Run
from sedd_graph.store.manifest import DamagedError
from sedd_graph.store.tape import MARK, TapeFacts

__all__ = ["INVERTED", "Marks", "Part", "canonical", "encode", "facts_of", "parts_of", "require_free", "require_same", "run_of", "sampling_facts", "starts"]  # fmt: skip

Array = npt.NDArray[Any]
INVERTED = "tape.zarr"
"""File name, in a run folder, of a tape."""


def canonical(value: object) -> str:
    """Return a JSON value as text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


class _Model(NamedTuple):
    """What a tape needs of a run folder: equal fields mean that the tape leads back to its texts."""

    parts: dict[str, str]
    tokenizer: str
    dtype: str
    weights: str
    blueprint: str


def _model_of(run: Run, kind: str) -> _Model:
    """Return what a tape of one kind needs of a run. For ``noise`` it is the forward process, and not the network."""
    plan, forward = run.plan, kind == "noise"
    parts = {role: canonical(value) for role, value in plan.record().items()}
    if forward:
        parts = {role: value for role, value in parts.items() if role in ("kernel", "schedule")}
    else:
        parts["sampler"] = canonical({"op": plan.sampler_op, **plan.sampling()})
    tensors = {
        name: value
        for name, value in sorted(run.engine.model.state_dict().items())
        if not forward or name.startswith((KERNEL, SCHEDULE))
    }
    found, dtypes = hashlib.sha256(), set[str]()
    for name, value in tensors.items():
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        if value.is_floating_point():
            dtypes.add(str(value.dtype).removeprefix("torch."))
    text = "" if run.tokenizer is None else hashlib.sha256(run.tokenizer.to_json().encode()).hexdigest()
    return _Model(parts, text, " and ".join(sorted(dtypes)) or "none", found.hexdigest(), run.digest)


def facts_of(run: Run, *, kind: Literal["text", "vectors", "samples", "noise"], **fields: Any) -> TapeFacts:
    """Return the facts of a tape.

    Args:
        run: The run folder.
        kind: The kind of the tape.
        **fields: The fields of :class:`TapeFacts` that do not follow from these.
    """
    return TapeFacts(
        kind=kind,
        **_model_of(run, kind)._asdict(),
        weights_file=run.weights,
        device=run.engine.device.type,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        **fields,
    )


def sampling_facts(run: Run, request: SampleRequest) -> dict[str, Any]:
    """Return the facts of a tape that follow from a sampling request; ``steps`` None means the sampler's own."""
    conditions = "" if request.conditions is None else canonical(request.conditions.model_dump(mode="json"))
    return {"conditions": conditions, "steps": request.steps or run.engine.process.steps}


def require_same(facts: TapeFacts, run: Run, where: Path) -> None:
    """Verify that a run folder has the model that a tape was written with.

    Args:
        facts: The facts of the tape.
        run: The run folder.
        where: The tape, for the error message.

    Raises:
        UserError: It has another process, tokenizer, dtype, weights or blueprint; for a tape of noised texts, another
            kernel, schedule or tokenizer. The message names the first difference.
    """
    model = _model_of(run, facts.kind)
    for role in sorted({*facts.parts, *model.parts}):
        if facts.parts.get(role) != model.parts.get(role):
            raise UserError(
                f"{where} was written with the {role} {_short(facts.parts.get(role))}; {run.path} has "
                f"{_short(model.parts.get(role))}: a tape needs the one that it was written with"
            )
    folder = "give the run folder that the tape was written with"
    wanted = [
        ("tokenizer", facts.tokenizer, model.tokenizer, folder),
        ("dtype of the weights", facts.dtype, model.dtype, folder),
        ("weights", facts.weights, model.weights, f"give --weights or the run folder with {facts.weights_file}"),
        ("blueprint", facts.blueprint, model.blueprint, folder),
    ]
    for name, held, own, advice in wanted[: 3 if facts.kind == "noise" else 4]:
        if held != own:
            raise UserError(
                f"{where} was written with another model: the {name} of {run.path} is {own[:16]}, not {held[:16]}: {advice}"
            )


def require_free(where: Path | None) -> None:
    """Raise :class:`UserError` if the path of a new tape exists."""
    if where is not None and where.exists():
        raise UserError(f"{where} exists already; choose another name")


def encode(tokenizer: Tokenizer, text: str, which: str) -> list[int]:
    """Return the tokens of a text, from which exactly this text is decoded.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        which: The text's name in the error message.

    Raises:
        UserError: The tokenizer does not have all characters of the text.
    """
    tokens: list[int] = tokenizer.encode(text).tolist()
    if not set(tokenizer.forbidden).isdisjoint(tokens) or tokenizer.decode(tokens) != text:
        raise UserError(f"{which} has characters that the model was not trained on: the tokenizer cannot restore it")
    return tokens


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
