"""Tapes as zarr groups: all that is needed to return from noise to text, and hashes to verify the return.

A tape holds the noise of a sampling run, which the run repeats (kinds ``text`` and ``samples``), or text that the kernel
has noised, with the bitstream that makes this noise a bijection (kind ``noise``).

A tape is untrusted input: :func:`read_tape` validates types, shapes and sizes, and the SHA-256 of all that was written.
A hash detects damage and mix-ups, not forgery. A forged tape can name other noise, but the rows after every step are
hashed, too, and are compared when the run is repeated.

Axes: r rows, k changes of noise, f checked frames, t tokens of all rows, p parts, s streams of a state, d width of a vector.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic

from sedd_graph.component.strict import Strict
from sedd_graph.errors import UserError
from sedd_graph.store.arrays import open_stored, read_array, write_samples
from sedd_graph.store.manifest import DamagedError

__all__ = ["MARK", "MAX_NUMBERS", "MAX_ROWS", "Tape", "TapeFacts", "read_tape", "write_tape"]

MARK = 16
"""Bytes of the hash of the rows after one step."""
MAX_ROWS, MAX_TOKENS, MAX_CHANGES = 2**20, 2**26, 2**26
"""Largest numbers of rows, tokens and changes of noise on a tape."""
MAX_NUMBERS = 2**28
"""Largest number of numbers of the noise of vectors."""
MAX_NUMBER = 2**50
"""Largest magnitude of a number of the noise of vectors, in units of the grid's spacing."""
_COLUMNS = {"call": np.int64, "row": np.int32, "place": np.int32, "state": np.int32, "value": np.float64}
_ARRAYS: Mapping[str, Mapping[str, Any]] = {
    "samples": {"marks": np.uint8},
    "text": {"marks": np.uint8, "start": np.int32, "lengths": np.int64, "seeds": np.int64, **_COLUMNS},
    "vectors": {"marks": np.uint8, "lengths": np.int64, "states": np.int64, "place": np.int64, "token": np.int64},
    "noise": {"noise": np.int32, "lengths": np.int64, "rows": np.int64, "bitstream": np.uint8, "sizes": np.int64},
}
"""Dtypes of the arrays of each kind of tape."""
_AXES = {"marks": 2, "states": 3}
"""Number of axes of the arrays that have more than one."""
_Hash = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]
_Short = Annotated[str, pydantic.Field(max_length=256)]


class TapeFacts(Strict):
    """Facts about the run that a tape repeats, stored as the attribute ``tape`` of its group."""

    format: Literal[2] = 2
    """Version of the format."""
    kind: Literal["text", "vectors", "samples", "noise"]
    """``text``: noise with which the sampler returns to given texts. ``vectors``: likewise, as states of vectors at the
    highest noise. ``samples``: the seed of samples. ``noise``: texts that the kernel has noised, with a bitstream."""
    weights: _Hash
    """SHA-256 of the weights, with their names, shapes and dtypes; for ``noise``, those of kernel and schedule alone."""
    weights_file: _Short
    """File of the weights, relative to the run folder."""
    dtype: _Short
    """Dtypes of the weights."""
    parts: dict[_Short, Annotated[str, pydantic.Field(max_length=2**20)]]
    """Canonical JSON of the Config of each component of the process, by role, such as ``sampler``."""
    blueprint: Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{16}$")]
    """Digest of the run's lock file."""
    tokenizer: Annotated[str, pydantic.Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """SHA-256 of the tokenizer; empty for a run without text."""
    conditions: Annotated[str, pydantic.Field(max_length=2**20)] = ""
    """Canonical JSON of the conditions on samples; empty for none."""
    steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] | None
    """Sampler steps, or steps of noise; null for a sampler without a number of steps."""
    until: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    """For ``noise``: time of the noise, which the steps divide evenly; null otherwise."""
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**63)]
    """Seed of the noise."""
    batch: Annotated[int, pydantic.Field(ge=1, le=MAX_ROWS)]
    """Largest number of rows that are drawn at a time; for ``samples``, the number of rows."""
    length: Annotated[int, pydantic.Field(ge=1, le=2**20)] | None = None
    """For ``samples``: tokens of each sample. Null for points of a flow, and for other kinds."""
    mask: Annotated[int, pydantic.Field(ge=0)] | None = None
    """Id of the mask; null for a process without mask."""
    device: _Short
    """Kind of the device, such as ``cpu``."""
    threads: Annotated[int, pydantic.Field(ge=1)]
    """Number of threads of torch."""
    torch: _Short
    """Version of torch."""
    digest: str = ""
    """SHA-256 of these facts without ``digest``, and of the arrays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tape:
    """A noise tape in memory.

    Attributes:
        facts: The run that it repeats.
        arrays: Arrays by name. ``marks`` uint8 [f, 16]: hash of the rows after each step and at the end, of one part
            after another. For kind ``text`` also ``start`` int32 [t], the initial rows one after another; ``lengths``
            int64 [r], their numbers of tokens; ``seeds`` int64 [r]; and the changes of noise, all [k]: ``call`` int64,
            ``row``, ``place`` and ``state`` int32, ``value`` float64
            (:class:`~sedd_graph.diffusion.tokens.noise_tape.Changes`). For kind ``vectors`` also ``lengths``; ``states``
            int64 [t, s, d], the states of all tokens one after another, in units of the grid's spacing; and, for each
            token that the network does not decode, its index ``place`` int64 and its id ``token`` int64.
            Kind ``noise`` has other arrays: ``noise`` int32
            [t], the noisy texts one after another; ``lengths`` int64 [r], their numbers of tokens; ``rows`` int64 [p],
            the number of texts of each part; ``bitstream`` uint8, the bitstreams of the parts
            (:class:`~sedd_graph.diffusion.bitstream.bitstream.Bitstream`) one after another; and ``sizes`` int64 [p],
            their numbers of bytes.
    """

    facts: TapeFacts
    arrays: Mapping[str, npt.NDArray[Any]]

    @property
    def rows(self) -> int:
        """Number of texts or samples."""
        return self.facts.batch if self.facts.kind == "samples" else len(self.arrays["lengths"])


def _digest(facts: TapeFacts, arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    found = hashlib.sha256(json.dumps(facts.model_dump(mode="json", exclude={"digest"}), sort_keys=True).encode())
    for name in sorted(arrays):
        data = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {data.dtype.str} {data.shape}".encode())
        found.update(data.tobytes())
    return found.hexdigest()


def write_tape(path: Path, tape: Tape, *, numbers: bool) -> Path:
    """Write a tape to a new zarr group, atomically.

    Args:
        path: Path of the group.
        tape: The tape.
        numbers: Whether a number is added to the name if it is taken (``tape-2.zarr``).

    Returns:
        The path of the new group.

    Raises:
        UserError: The path is taken, and ``numbers`` is False; or it is invalid.
        EnvironmentFault: The disk cannot be written.
    """
    facts = tape.facts.model_copy(update={"digest": _digest(tape.facts, tape.arrays)})
    return write_samples(path, tape.arrays, attributes={"tape": facts.model_dump(mode="json")}, numbers=numbers)


def read_tape(path: Path) -> Tape:
    """Read and validate a tape.

    Raises:
        UserError: There is no tape, or it is too large.
        DamagedError: It is not what was written.
    """
    if not (path / "zarr.json").is_file():
        raise UserError(f"{path} is not a tape: there is no zarr.json in it")
    group = open_stored(path)
    try:
        facts = TapeFacts.model_validate(dict(group.attrs).get("tape"))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["tape", *map(str, first["loc"])])
        raise DamagedError(f"{path}: attribute {where}: {first['msg']}: not a tape of `sedd-graph invert`") from None
    dtypes = _ARRAYS[facts.kind]
    arrays = {name: read_array(group, name) for name in dtypes}
    for name, dtype in dtypes.items():
        axes = _AXES.get(name, 1)
        if arrays[name].dtype != dtype or arrays[name].ndim != axes:
            raise DamagedError(
                f"{path}/{name} is {arrays[name].dtype} {list(arrays[name].shape)}, not {dtype.__name__} of {axes} axes"
            )
    if "marks" in arrays and arrays["marks"].shape[1] != MARK:
        raise DamagedError(f"{path}/marks is not of hashes of {MARK} bytes")
    if _digest(facts, arrays) != facts.digest:
        raise DamagedError(f"{path} was altered: its content does not have the SHA-256 that it was written with")
    if facts.kind == "text":
        _validate(path, arrays)
    elif facts.kind == "vectors":
        _validate_vectors(path, arrays)
    elif facts.kind == "noise":
        _validate_noise(path, facts, arrays)
    return Tape(facts=facts, arrays=arrays)


def _validate(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Verify that the arrays of a tape of texts fit each other, whoever wrote them."""
    _validate_lengths(path, arrays["lengths"])
    lengths, rows = arrays["lengths"], len(arrays["lengths"])
    sizes = {len(arrays[name]) for name in _COLUMNS}
    if len(arrays["start"]) != lengths.sum() or len(arrays["seeds"]) != rows or len(sizes) != 1:
        raise DamagedError(f"{path}: the arrays of the tape do not fit each other")
    if max(sizes) > MAX_CHANGES:
        raise DamagedError(f"{path}: there are more than {MAX_CHANGES:,} changes of noise")
    row, place = arrays["row"], arrays["place"]
    if (row < 0).any() or (row >= rows).any() or (place < 0).any() or (place >= lengths[row]).any():
        raise DamagedError(f"{path}: a change of noise is at no position of the tape")


def _validate_lengths(path: Path, lengths: npt.NDArray[Any]) -> None:
    if not 1 <= len(lengths) <= MAX_ROWS or (lengths < 0).any() or int(lengths.astype(object).sum()) > MAX_TOKENS:
        raise DamagedError(f"{path}: lengths is not that of 1 to {MAX_ROWS:,} rows with at most {MAX_TOKENS:,} tokens")


def _validate_vectors(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Verify that the arrays of a tape of vectors fit each other, whoever wrote them."""
    _validate_lengths(path, arrays["lengths"])
    tokens, noise, place = int(arrays["lengths"].sum()), arrays["states"], arrays["place"]
    if len(noise) != tokens or not noise.size:
        raise DamagedError(f"{path}: states is not that of {tokens:,} tokens")
    if (noise > MAX_NUMBER).any() or (noise < -MAX_NUMBER).any():
        raise DamagedError(f"{path}: a number of the noise is out of range")
    if len(place) != len(arrays["token"]) or (place < 0).any() or (place >= tokens).any() or (np.diff(place) < 1).any():
        raise DamagedError(f"{path}: a stored token is at no position of the tape")
    if (arrays["token"] < 0).any():
        raise DamagedError(f"{path}: a stored token has no id")


def _validate_noise(path: Path, facts: TapeFacts, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Verify that the arrays of a tape of noised texts fit each other, whoever wrote them."""
    _validate_lengths(path, arrays["lengths"])
    counts, sizes = arrays["rows"], arrays["sizes"]
    fits = len(counts) == len(sizes) and not (counts < 1).any() and not (sizes < 1).any()
    for part, whole in ((counts, arrays["lengths"]), (sizes, arrays["bitstream"])):
        fits = fits and int(part.astype(object).sum()) == len(whole)
    if not fits or len(arrays["noise"]) != arrays["lengths"].sum() or facts.until is None or facts.steps is None:
        raise DamagedError(f"{path}: the arrays of the tape do not fit each other")
