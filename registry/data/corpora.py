"""Corpora of documents: a built-in text, text files, JSON Lines files, Parquet files and Hugging Face data sets.

The module does not import torch.
"""

import codecs
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import pydantic

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.data.characters import BLOCK, split_stream
from sedd_graph.data.network import unreachable
from sedd_graph.data.reading import BOM, decode_utf8, find_files, import_extra, missing_field, read_document
from sedd_graph.data.sources import MAX_BYTES, Corpus, Document
from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.inputs.child import run_limited
from sedd_graph.inputs.confine import confined
from sedd_graph.inputs.files import require_file, size_text

from ._compressed import MAX_FILE, open_stream
from ._parquet import read_rows

MAX_LINE = 256 * 2**20
"""Size limit of one line of a JSON Lines file, in bytes."""
PARQUET_FLOOR, PARQUET_RATIO = 256 * 2**20, 256
"""Limit of the text of a Parquet file: so many characters, and so many more for each byte of the file."""
PARQUET_MEMORY = 3 * 2**29
"""Limit of the memory in which a Parquet file is read, in bytes, to which four times the size of the file are added."""
PARQUET_SILENCE_S = 60.0
"""Longest time that reading 1,024 rows of a Parquet file may take, in seconds."""

FileName = Annotated[str, pydantic.Field(min_length=1, max_length=1024)]
Files = Annotated[list[FileName], pydantic.Field(min_length=1, max_length=4096)]


HUB_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?")
"""Form of the name of a data set on the hub; any other name is a path."""


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


class FileCorpus(Corpus):
    """Base class of corpora in files that the key ``files`` names."""

    abstract = True
    config: Any  # a Config with the key ``files``

    def files(self, root: Path) -> list[Path]:
        return find_files(self.config.files, root)


class Builtin(Corpus, kind="corpus"):
    """Built-in corpus: about 650,000 characters of English, CPython's documentation (``pydoc_data.topics``)."""

    records = False

    class Config(ComponentConfig):
        pass

    def documents(self, root: Path) -> Iterator[Document]:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        yield from (Document(topics[name].strip() + "\n\n") for name in sorted(topics))


class Text(FileCorpus, kind="corpus"):
    """Corpus of UTF-8 text files, one document per file. Files ``.gz`` and ``.zst`` are decompressed."""

    records = False

    class Config(ComponentConfig):
        files: Files
        """File names or glob patterns of the corpus files, relative to the blueprint's folder."""

    config: Config

    def documents(self, root: Path) -> Iterator[Document]:
        for path in self.files(root):
            with open_stream(path, limit=MAX_BYTES) as stream:
                raw = stream.read(MAX_BYTES + 1)
            if raw is None or len(raw) > MAX_BYTES:
                raise UserError(
                    f"{path}: has more than {size_text(MAX_BYTES)}, which is the limit of what is read into memory"
                )
            skipped = len(BOM) if raw.startswith(BOM) else 0
            yield Document(decode_utf8(raw[skipped:] if skipped else raw, str(path), skipped))

    def text(self, root: Path) -> Iterator[tuple[str, bool]]:
        for path in self.files(root):
            with open_stream(path) as stream:
                yield from split_stream(_decoded(stream, path))


def _decoded(stream: BinaryIO, path: Path) -> Iterator[str]:
    """Yield the text of a file of UTF-8 in blocks; raises :class:`UserError` that names the first invalid byte."""
    decoder, offset, first = codecs.getincrementaldecoder("utf-8")(), 0, True
    while True:
        raw = stream.read(BLOCK)
        skipped = len(BOM) if first and raw.startswith(BOM) else 0
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(raw[skipped:], final=not raw)
        except UnicodeDecodeError as error:
            where = offset + skipped - waiting + error.start
            raise UserError(f"{path}: not UTF-8: byte {where} is 0x{error.object[error.start]:02x}") from None
        yield text
        if not raw:
            return
        offset, first = offset + len(raw), False


class Jsonl(FileCorpus, kind="corpus"):
    """Corpus of JSON Lines files, one document per line. Files ``.gz`` and ``.zst`` are decompressed."""

    class Config(RecordFiles):
        pass

    config: Config

    def documents(self, root: Path) -> Iterator[Document]:
        for path in self.files(root):
            with open_stream(path) as stream:
                offset = 0
                for number, line in enumerate(_lines(stream, path), 1):
                    where = f"{path}:{number}"
                    skipped = len(BOM) if number == 1 and line.startswith(BOM) else 0
                    text = decode_utf8(line[skipped:], where, offset + skipped)
                    offset += len(line)
                    if text.strip():
                        record = _parsed(text.rstrip(), where)
                        yield read_document(record, where, self.config.field, self.config.prompt)


def _lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; raises :class:`UserError` for a line without end, which could fill the memory."""
    number = 1
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise UserError(
                f"{path}:{number}: a line of more than {size_text(MAX_LINE)}: JSON Lines has one object per line"
            )
        yield line
        number += 1


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


class Parquet(FileCorpus, kind="corpus"):
    """Corpus of Parquet files, one document per row. Requires the optional dependencies ``sedd_graph[datasets]``."""

    class Config(RecordFiles):
        pass

    config: Config

    def files(self, root: Path) -> list[Path]:
        import_extra("pyarrow.parquet", "the corpus 'parquet'", extra="datasets")
        return super().files(root)

    def documents(self, root: Path) -> Iterator[Document]:
        config = self.config
        for path in self.files(root):
            size = require_file(path, limit=MAX_FILE).st_size
            # the text of a good file is a few times its size; a bomb's is a million times
            budget = PARQUET_FLOOR + PARQUET_RATIO * size
            number = 0
            for batch in run_limited(
                read_rows,
                str(path),
                config.columns,
                budget,
                what=str(path),
                memory=PARQUET_MEMORY + 4 * size,
                silence_s=PARQUET_SILENCE_S,
            ):
                if "missing" in batch:
                    raise missing_field(str(path), batch["missing"], batch["names"])
                for values in batch["rows"]:
                    number += 1
                    where, record = f"{path}: row {number}", dict(zip(config.columns, values, strict=True))
                    for name, value in record.items():
                        if isinstance(value, dict):
                            raise UserError(f"{where}: field {name!r} is {value['type']}, not text")
                    yield read_document(record, where, config.field, config.prompt)


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
        streaming: bool = False
        """True to read rows of a data set on the hub as they are needed, instead of downloading all of it first."""

    config: Config

    def documents(self, root: Path) -> Iterator[Document]:
        config, local = self.config, root / self.config.name
        if local.exists() or not HUB_NAME.fullmatch(config.name):
            local = confined(config.name, root, what="data.corpus.name")
        lost = None if local.is_dir() else _without_network()
        library = import_extra("datasets", "the corpus 'dataset'", extra="datasets")
        try:
            if (local / "state.json").is_file():  # one split, written by the library's save_to_disk
                table = library.load_from_disk(str(local))
            elif (local / "dataset_dict.json").is_file():
                table = library.load_from_disk(str(local / config.split))
            else:
                source = str(local) if local.is_dir() else config.name
                table = library.load_dataset(source, config.subset, split=config.split, streaming=config.streaming)
        except Exception as error:  # network, hub and format errors of the library come in many classes
            if lost is not None:
                raise EnvironmentFault(
                    f"data.corpus: the data set {config.name!r} is neither in a folder nor in the cache of the datasets "
                    f"library, and {lost}"
                ) from None
            raise UserError(f"data.corpus: the datasets library cannot load {config.name!r}: {error}") from None
        for name in config.columns:
            if table.column_names is not None and name not in table.column_names:  # None: known only from the rows
                raise missing_field(f"data.corpus: {config.name}", name, list(table.column_names))
        for number, record in enumerate(_rows(table.select_columns(config.columns), config.name), 1):
            yield read_document(record, f"{config.name}: row {number}", config.field, config.prompt)


def _rows(table: Iterable[Any], name: str) -> Iterator[Any]:
    """Yield the rows of a data set; an error of a streamed one, which is read as it goes, becomes a :class:`UserError`."""
    rows, number = iter(table), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as above: network, hub and format errors
            raise UserError(f"data.corpus: {name}: cannot be read after row {number}: {error}") from None
        number += 1
        yield row


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
