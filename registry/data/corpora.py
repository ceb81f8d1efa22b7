"""Corpora of text: a built-in one, text files, JSON lines, Parquet and the ``datasets`` library. No torch."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.data.reading import (
    BOM,
    decode_utf8,
    find_files,
    import_extra,
    missing_field,
    read_document,
    unreadable,
)
from sedd_graph.data.sources import Corpus, Document
from sedd_graph.errors import UserError

FileName = Annotated[str, pydantic.Field(min_length=1, max_length=1024)]
Files = Annotated[list[FileName], pydantic.Field(min_length=1, max_length=4096)]


class Fields(ComponentConfig):
    """Fields of a record that hold its texts."""

    field: str = "text"
    """Field that holds the text."""
    prompt: str | None = None
    """Field that holds the prompt before the text; null for none. Needs ``rows: documents``."""

    @property
    def columns(self) -> list[str]:
        """The fields that are read, each once."""
        return list(dict.fromkeys([self.field, *([self.prompt] if self.prompt is not None else [])]))


class RecordFiles(Fields):
    """Files of records, and the fields that hold their texts."""

    files: Files
    """File names or glob patterns, relative to the blueprint's folder."""


class Builtin(Corpus, kind="corpus"):
    """The documentation that CPython ships (``pydoc_data.topics``): about 650,000 characters of English."""

    records = False

    class Config(ComponentConfig):
        pass

    def documents(self, root: Path) -> Iterator[Document]:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        yield from (Document(topics[name].strip() + "\n\n") for name in sorted(topics))


class Text(Corpus, kind="corpus"):
    """UTF-8 text files. Each file is a document."""

    records = False

    class Config(ComponentConfig):
        files: Files
        """File names or glob patterns, relative to the blueprint's folder."""

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
    """Files of one JSON object per line. Each object is a document."""

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
        # not str(error): its "line 1" is a line of this line
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None


class Parquet(Corpus, kind="corpus"):
    """Parquet files (extra ``datasets``). Each row is a document."""

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
                    # a few columns of a few rows at a time: other columns may be large
                    for batch in table.iter_batches(batch_size=4096, columns=config.columns):
                        for record in batch.to_pylist():
                            number += 1
                            yield read_document(record, f"{path}: row {number}", config.field, config.prompt)
                except (OSError, ValueError) as error:
                    raise UserError(f"{path}: damaged after row {number}: {error}") from None


class HubDataset(Corpus, kind="corpus"):
    """A data set of the ``datasets`` library (extra ``datasets``): one of the hub, or a local folder. Each row is a document."""

    class Config(Fields):
        name: FileName
        """Name on the hub, or a folder relative to the blueprint's folder."""
        subset: str | None = None
        """Configuration of the data set, where it has several."""
        split: str = "train"
        """Split that is read."""

    config: Config

    def documents(self, root: Path) -> Iterator[Document]:
        library = import_extra("datasets", "the corpus 'dataset'", extra="datasets")
        config, local = self.config, root / self.config.name
        try:
            if (local / "state.json").is_file():  # the folder of one split, by the library's save_to_disk
                table = library.load_from_disk(str(local))
            elif (local / "dataset_dict.json").is_file():
                table = library.load_from_disk(str(local / config.split))
            else:
                source = str(local) if local.is_dir() else config.name
                table = library.load_dataset(source, config.subset, split=config.split)
        except Exception as error:  # network, hub and format errors of the library come in many classes
            raise UserError(f"data.corpus: the datasets library cannot load {config.name!r}: {error}") from None
        for name in config.columns:
            if name not in table.column_names:
                raise missing_field(f"data.corpus: {config.name}", name, list(table.column_names))
        for number, record in enumerate(table.select_columns(config.columns), 1):
            yield read_document(record, f"{config.name}: row {number}", config.field, config.prompt)
