"""Corpora of documents: a built-in text, text files, JSON Lines files, Parquet files and Hugging Face data sets.

The module does not import torch.
"""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.data.network import unreachable
from sedd_graph.data.reading import BOM, decode_utf8, find_files, import_extra, missing_field, read_document, unreadable
from sedd_graph.data.sources import Corpus, Document
from sedd_graph.errors import EnvironmentFault, UserError

FileName = Annotated[str, pydantic.Field(min_length=1, max_length=1024)]
Files = Annotated[list[FileName], pydantic.Field(min_length=1, max_length=4096)]


class Fields(ComponentConfig):
    """Config keys of corpora whose documents are records: the names of the text field and of the prompt field."""

    field: str = "text"
    """Name of the field with the text of a document."""
    prompt: str | None = None
    """Name of the field with the prompt that precedes the text; null: documents have no prompt.
    Requires ``rows: documents``."""

    @property
    def columns(self) -> list[str]:
        """Names of the fields to read, the text field first, without duplicates."""
        return list(dict.fromkeys([self.field, *([self.prompt] if self.prompt is not None else [])]))


class RecordFiles(Fields):
    """Config keys of corpora in files of records: the files, the text field and the prompt field."""

    files: Files
    """File names or glob patterns of the corpus files, relative to the blueprint's folder."""


class Builtin(Corpus, kind="corpus"):
    """Built-in corpus: about 650,000 characters of English, CPython's documentation (``pydoc_data.topics``)."""

    records = False

    class Config(ComponentConfig):
        pass

    def documents(self, root: Path) -> Iterator[Document]:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        yield from (Document(topics[name].strip() + "\n\n") for name in sorted(topics))


class Text(Corpus, kind="corpus"):
    """Corpus of UTF-8 text files, one document per file."""

    records = False

    class Config(ComponentConfig):
        files: Files
        """File names or glob patterns of the corpus files, relative to the blueprint's folder."""

    config: Config

    def documents(self, root: Path) -> Iterator[Document]:
        for path in find_files(self.config.files, root):
            try:
                raw = path.read_bytes()
            except OSError as error:
                raise unreadable(path, error) from None
            skipped = len(BOM) if raw.startswith(BOM) else 0
            yield Document(decode_utf8(raw[skipped:] if skipped else raw, str(path), skipped))


class Jsonl(Corpus, kind="corpus"):
    """Corpus of JSON Lines files, one document per line."""

    class Config(RecordFiles):
        pass

    config: Config

    def documents(self, root: Path) -> Iterator[Document]:
        for path in find_files(self.config.files, root):
            try:
                with path.open("rb") as lines:
                    offset = 0
                    for number, line in enumerate(lines, 1):
                        where = f"{path}:{number}"
                        skipped = len(BOM) if number == 1 and line.startswith(BOM) else 0
                        text = decode_utf8(line[skipped:], where, offset + skipped)
                        offset += len(line)
                        if text.strip():
                            record = _parsed(text.rstrip(), where)
                            yield read_document(record, where, self.config.field, self.config.prompt)
            except OSError as error:
                raise unreadable(path, error) from None


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise UserError(f"{where}: not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        # str(error) would call every line of the file "line 1"
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None


class Parquet(Corpus, kind="corpus"):
    """Corpus of Parquet files, one document per row. Requires the optional dependencies ``sedd_graph[datasets]``."""

    class Config(RecordFiles):
        pass

    config: Config

    def documents(self, root: Path) -> Iterator[Document]:
        library = import_extra("pyarrow.parquet", "the corpus 'parquet'", extra="datasets")
        config = self.config
        for path in find_files(config.files, root):
            try:
                table = library.ParquetFile(path)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: not a Parquet file: {error}") from None
            with table:
                names = list(table.schema_arrow.names)
                for name in config.columns:
                    if name not in names:
                        raise missing_field(str(path), name, names)
                number = 0
                try:
                    # in batches and without the other columns, which may be large
                    for batch in table.iter_batches(batch_size=4096, columns=config.columns):
                        for record in batch.to_pylist():
                            number += 1
                            yield read_document(record, f"{path}: row {number}", config.field, config.prompt)
                except (OSError, ValueError) as error:
                    raise UserError(f"{path}: cannot be read after row {number}: {error}") from None


class HubDataset(Corpus, kind="corpus"):
    """Data set from the Hugging Face hub or a local folder, one document per row, read by the ``datasets`` library.

    Requires the optional dependencies ``sedd_graph[datasets]``.
    """

    class Config(Fields):
        name: FileName
        """Name of the data set on the hub, or its folder, relative to the blueprint's folder."""
        subset: str | None = None
        """Name of the data set's configuration, if there are several; null: the default one."""
        split: str = "train"
        """Name of the split to read."""

    config: Config

    def documents(self, root: Path) -> Iterator[Document]:
        config, local = self.config, root / self.config.name
        lost = None if local.is_dir() else _without_network()
        library = import_extra("datasets", "the corpus 'dataset'", extra="datasets")
        try:
            if (local / "state.json").is_file():  # one split, written by the library's save_to_disk
                table = library.load_from_disk(str(local))
            elif (local / "dataset_dict.json").is_file():
                table = library.load_from_disk(str(local / config.split))
            else:
                source = str(local) if local.is_dir() else config.name
                table = library.load_dataset(source, config.subset, split=config.split)
        except Exception as error:  # network, hub and format errors of the library come in many classes
            if lost is not None:
                raise EnvironmentFault(
                    f"data.corpus: the data set {config.name!r} is neither in a folder nor in the cache of the datasets "
                    f"library, and {lost}"
                ) from None
            raise UserError(f"data.corpus: the datasets library cannot load {config.name!r}: {error}") from None
        for name in config.columns:
            if name not in table.column_names:
                raise missing_field(f"data.corpus: {config.name}", name, list(table.column_names))
        for number, record in enumerate(table.select_columns(config.columns), 1):
            yield read_document(record, f"{config.name}: row {number}", config.field, config.prompt)


def _without_network() -> str | None:
    """Make the ``datasets`` library use its cache alone if the hub cannot be reached; return the reason, or None.

    The library itself would retry for minutes. It reads the variable when it is first imported.
    """
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if importlib.util.find_spec("datasets") is None or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return None
    if (reason := unreachable(hub)) is None:
        return None
    os.environ["HF_HUB_OFFLINE"] = "1"
    return f"{hub} cannot be reached: {reason}"
