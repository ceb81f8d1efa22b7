"""Tokens of a run's corpus, kept in the run folder so that its text is tokenised once."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pydantic

from sedd_graph.component.strict import Strict
from sedd_graph.data.cached import NUMBERS, Tokenised
from sedd_graph.errors import SeddGraphError
from sedd_graph.inputs.arrays import map_npy
from sedd_graph.inputs.confine import require_inside
from sedd_graph.store.files import part_folder, read_json, remove, subfolder, write_json

__all__ = ["TOKENS", "FolderCache", "PendingCache"]

TOKENS = "tokens"
"""Name of the folder of a run's tokens."""
INDEX = "index.json"
MAX_ARRAY = 2**40
_NAMES = r"^(train|heldout)\.(tokens|starts|prompts)$"


class _Array(Strict):
    """Entry of one array in ``index.json``."""

    dtype: Annotated[str, pydantic.Field(pattern=r"^<(u2|u4|i8)$")]
    length: Annotated[int, pydantic.Field(ge=0, le=2**40)]
    sha256: Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]


class _Index(Strict):
    """Content of ``tokens/index.json``."""

    key: Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]
    """What the tokens depend on (:func:`sedd_graph.data.cached.cache_key`)."""
    arrays: Annotated[dict[Annotated[str, pydantic.Field(pattern=_NAMES)], _Array], pydantic.Field(max_length=6)]
    numbers: Annotated[dict[str, float], pydantic.Field(max_length=len(NUMBERS))]


class PendingCache:
    """Tokens that are kept in memory until the run folder is written."""

    def __init__(self) -> None:
        self._found: tuple[str, Tokenised] | None = None

    def holds(self) -> bool:
        return False

    def load(self, key: str) -> Tokenised | None:
        return None

    def save(self, key: str, found: Tokenised) -> None:
        self._found = key, found

    def write(self, run: Path) -> None:
        """Write the tokens, if there are any, to a run folder that is being made."""
        if self._found is not None:
            (run / TOKENS).mkdir()
            _write(run / TOKENS, *self._found)


class FolderCache:
    """Tokens in a run folder.

    They are used only if their key is that of the text as it is now, and if every array is what was written. A cache that
    cannot be written, as in a read-only folder, is not kept.

    Args:
        run: The run folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = run

    def holds(self) -> bool:
        return (self._run / TOKENS / INDEX).is_file()

    def load(self, key: str) -> Tokenised | None:
        try:
            require_inside(self._run, TOKENS, deep=True)
            folder = self._run / TOKENS
            index = _Index.model_validate(read_json(folder / INDEX))
            if index.key != key:
                return None
            arrays = {name: _array(folder / f"{name}.npy", entry) for name, entry in index.arrays.items()}
        except (SeddGraphError, pydantic.ValidationError, OSError):
            return None
        if any(array is None for array in arrays.values()):
            return None
        return Tokenised({name: array for name, array in arrays.items() if array is not None}, index.numbers)

    def save(self, key: str, found: Tokenised) -> None:
        with contextlib.suppress(SeddGraphError, OSError):
            folder = subfolder(self._run, TOKENS)
            with part_folder(folder) as part:
                _write(part, key, found)
                remove(folder)
                part.rename(folder)  # another process may have written the same in the meantime


def _array(path: Path, entry: _Array) -> npt.NDArray[Any] | None:
    """Map an array into memory; None if its content is not what was written."""
    array = map_npy(path, limit=MAX_ARRAY, dtypes=(entry.dtype,), shape=(entry.length,))
    return array if _sha256(array) == entry.sha256 else None


def _sha256(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _write(folder: Path, key: str, found: Tokenised) -> None:
    entries = {}
    for name, array in found.arrays.items():
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        np.save(folder / f"{name}.npy", little, allow_pickle=False)
        entries[name] = _Array(dtype=little.dtype.str, length=len(little), sha256=_sha256(little))
    index = _Index(key=key, arrays=entries, numbers=dict(found.numbers))
    write_json(folder / INDEX, index.model_dump(mode="json"))
