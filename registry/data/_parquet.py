"""Reading of Parquet files, in a child process with limits. Imports nothing of this project."""

from collections.abc import Iterator
from typing import Any

ROW_COST = 256
"""Characters that a row counts for beside its text: rows without text take memory too."""


PART = 2**24
"""Number of characters, about, that are handed on at a time."""


def read_rows(path: str, columns: list[str], budget: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file in batches.

    Args:
        path: The file.
        columns: Names of the columns to read.
        budget: Largest number of characters in all, where each row counts for :data:`ROW_COST` more than its text.

    Yields:
        ``{"rows": [[value, ...], ...]}`` with one value for each column, or once ``{"missing": name, "names": [...]}``
        if there is no column of that name. A value that is neither a text nor None is given as ``{"type": name}``.

    Raises:
        ValueError: The file cannot be read as Parquet, or holds more than ``budget`` characters.
    """
    from pyarrow import parquet, types

    try:
        schema = parquet.ParquetFile(path).schema_arrow
        for name in columns:
            if name not in schema.names:
                yield {"missing": name, "names": schema.names[:500]}
                return
        # as a dictionary, a text that many rows have in common is in memory once
        texts = [n for n in columns if types.is_string(schema.field(n).type)]
        table = parquet.ParquetFile(path, read_dictionary=texts, buffer_size=2**20)
    except (OSError, ValueError) as error:
        raise ValueError(f"not a Parquet file: {error}") from None
    spent = sent = number = 0
    try:
        # in batches and without the other columns, which may be large
        for batch in table.iter_batches(batch_size=4096, columns=columns, use_threads=False):
            rows: list[tuple[Any, ...]] = []
            for row in zip(*(_values(batch.column(name)) for name in columns), strict=True):
                spent += ROW_COST + sum(len(value) for value in row if isinstance(value, str))
                if spent > budget:
                    raise OverflowError
                number += 1
                rows.append(row)
                if spent - sent > PART:
                    yield {"rows": rows}
                    rows, sent = [], spent
            yield {"rows": rows}
            sent = spent
    except OverflowError:
        raise ValueError(f"holds more than {budget:,} characters after row {number:,}: too many for its size") from None
    except MemoryError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read after row {number}: {error}") from None


def _values(column: Any) -> list[Any]:
    """Return the values of a column, in which equal texts are one object."""
    from pyarrow import types

    if not types.is_dictionary(column.type):
        return [_plain(value) for value in column.to_pylist()]
    used = column.indices.unique()
    texts = dict(zip(used.to_pylist(), column.dictionary.take(used).to_pylist(), strict=True))
    return [texts[index] for index in column.indices.to_pylist()]


def _plain(value: Any) -> Any:
    """Return a text or None unchanged, and of another value a mapping with the name of its type."""
    return value if value is None or isinstance(value, str) else {"type": type(value).__name__}
