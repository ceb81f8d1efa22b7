"""Corpora that are prepared already: tokens in shards, and the text8 benchmark. The module does not import torch."""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import pydantic

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.data.reading import find_files
from sedd_graph.data.shard_index import INDEX, read_index
from sedd_graph.data.shards import Shards
from sedd_graph.data.sources import Corpus, Document
from sedd_graph.data.tokenizer import FILE
from sedd_graph.errors import UserError
from sedd_graph.inputs.confine import confined
from sedd_graph.inputs.files import read_bytes

from .corpora import FileName, Files


class Tokens(Corpus, kind="corpus"):
    """Tokens in shards that ``sedd-graph tokenize`` has written; they are mapped into memory, never read whole."""

    class Config(ComponentConfig):
        files: Files
        """Folders of shards, or names or glob patterns of their ``index.json``, relative to the blueprint's folder."""

    config: Config

    def shards(self, root: Path) -> Shards:
        names = [f"{name}/{INDEX}" if _is_folder(root / name) else name for name in self.config.files]
        for name in names:
            if (root / name).parent.is_dir() and Path(name).name == INDEX and not (root / name).exists():
                raise UserError(
                    f"data.corpus.files: {str(Path(name).parent)!r} has no {INDEX}: it holds no shards, or "
                    "`sedd-graph tokenize` has not finished them; run it again to go on"
                )
        paths = find_files(names, root)
        for path in paths:  # a link within the folder could lead elsewhere
            for file in (*path.parent.glob("*.npy"), path.parent / FILE):
                confined(file, root, what="data.corpus.files")
        return Shards([(path.parent, read_index(path)) for path in paths])

    def documents(self, root: Path) -> Iterator[Document]:
        shards = self.shards(root)
        tokenizer = shards.tokenizer()
        for number in range(shards.documents):
            (start,), (stop,) = shards.spans(np.array([number]))
            lengths = np.array([stop - start])
            yield Document(tokenizer.decode(shards.rows(np.array([start]), lengths, int(lengths[0]))[0].tolist()))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # no path of a file, which find_files reports
        return False


class Published(NamedTuple):
    """Facts of a published file by which it is known: its MD5, and the sizes of its parts in bytes."""

    md5: str
    """MD5 of the file, hexadecimal."""
    sizes: tuple[int, int, int]
    """Sizes of the training, validation and test parts, in this order."""


class Text8(Corpus, kind="corpus"):
    """Text8: 100 million letters and spaces of Wikipedia, of which 90, 5 and 5 million are for training, validation and test.

    The file is that of http://mattmahoney.net/dc/text8.zip, unpacked or not; another file is refused.
    """

    records = False
    published: ClassVar[Published] = Published("3bea1919949baf155f99411df5fada7e", (90_000_000, 5_000_000, 5_000_000))
    """The published file and its usual division (D3PM, arXiv 2107.03006, appendix B)."""

    class Config(ComponentConfig):
        file: FileName = "text8"
        """Path of the file ``text8`` or ``text8.zip``, relative to the blueprint's folder."""
        part: Annotated[Literal["train", "valid", "test"], pydantic.Field()] = "train"
        """Part of the file: the first 90, the next 5, or the last 5 million characters."""

    config: Config

    def documents(self, root: Path) -> Iterator[Document]:
        path = confined(self.config.file, root, what="data.corpus.file")
        raw, sizes = self._content(path), self.published.sizes
        found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if len(raw) != sum(sizes) or found != self.published.md5:
            raise UserError(
                f"{path} is not the file text8: it has {len(raw):,} bytes and MD5 {found}, not {sum(sizes):,} and "
                f"{self.published.md5} (http://mattmahoney.net/dc/text8.zip)"
            )
        number = ("train", "valid", "test").index(self.config.part)
        start = sum(sizes[:number])
        yield Document(raw[start : start + sizes[number]].decode("ascii"))

    def _content(self, path: Path) -> bytes:
        """Return the content of the file, or of its member ``text8`` if it is a zip archive; a byte more if it is larger."""
        size = sum(self.published.sizes)
        raw = read_bytes(path, limit=2 * size + 2**20)
        if not raw.startswith(b"PK\x03\x04"):
            return raw
        try:
            with zipfile.ZipFile(io.BytesIO(raw)) as archive, archive.open("text8") as stream:
                return stream.read(size + 1)
        except (KeyError, zipfile.BadZipFile, zlib.error, RuntimeError, OSError, EOFError) as error:
            raise UserError(f"{path}: cannot be read as a zip archive with a file 'text8': {error}") from None
