"""Corpus of sequences in FASTA files: DNA, RNA or protein. The module does not import torch."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import pydantic

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.data.reading import BOM
from sedd_graph.data.sources import Document
from sedd_graph.errors import UserError
from sedd_graph.inputs.files import size_text

from ._compressed import open_stream
from .corpora import FileCorpus, Files

MAX_LINE = 2**20
"""Number of bytes of a line that are read at a time; a line of sequence may be longer, a header may not."""
MAX_SEQUENCE = 2**30
"""Largest number of characters of one sequence, which is held in memory."""
BLANKS = b" \t\r\n\v\f"
COMPLEMENT = bytes.maketrans(b"ACGTN", b"TGCAN")
INVALID = b"!"


class Code(NamedTuple):
    """Characters of FASTA sequences of one kind of molecule, and the form in which a document has them."""

    name: str
    """What one character stands for, for messages."""
    table: bytes
    """Table of ``bytes.translate``: letters to upper case, ambiguous ones to one letter, all other bytes to ``!``."""
    skipped: bytes
    """Characters that are left out: white space, gaps, stops."""


def _code(name: str, letters: str, *, replaced: dict[str, str], skipped: str) -> Code:
    """Return a code in which ``letters`` stand for themselves in both cases, and others are replaced."""
    table = bytearray(INVALID * 256)
    for given, kept in ({letter: letter for letter in letters} | replaced).items():
        table[ord(given)] = table[ord(given.lower())] = ord(kept)
    return Code(name, bytes(table), BLANKS + skipped.encode())


CODES = {
    "dna": _code("nucleotide", "ACGTN", replaced={"U": "T"} | dict.fromkeys("RYSWKMBDHVX", "N"), skipped="-."),
    "protein": _code("amino acid", "ACDEFGHIKLMNPQRSTVWYX", replaced=dict.fromkeys("BJOUZ", "X"), skipped="-.*"),
}
"""Codes by molecule (IUPAC-IUB 1984 nucleotides and amino acids)."""


class Fasta(FileCorpus, kind="corpus"):
    """Corpus of FASTA files of DNA, RNA or protein, one document per record. Files ``.gz`` and ``.zst`` are decompressed.

    A document is the sequence alone, in upper case: of DNA the letters ``ACGTN`` (``U`` is read as ``T``, every ambiguous
    code of IUPAC as ``N``), of protein the 20 amino acids and ``X`` (for every other one). Gaps (``-``, ``.``) and stops of
    translation (``*``) are left out. Headers are not part of the text.
    """

    class Config(ComponentConfig):
        files: Files
        """File names or glob patterns of the FASTA files, relative to the blueprint's folder."""
        molecule: Literal["dna", "protein"] = "dna"
        """``dna`` (or RNA) or ``protein``: which letters a sequence may have."""
        reverse_complement: bool = False
        """True if the reverse complement of each sequence follows it as a document of its own, since both strands of DNA
        are read. Requires ``data.heldout``: the end of the corpus would repeat the training part."""

        @pydantic.model_validator(mode="after")
        def _of_dna(self) -> "Fasta.Config":
            if self.reverse_complement and self.molecule != "dna":
                raise ValueError("'reverse_complement' is of DNA alone; a protein has no second strand")
            return self

    config: Config

    @property
    def repeats(self) -> bool:
        return self.config.reverse_complement

    def documents(self, root: Path) -> Iterator[Document]:
        code = CODES[self.config.molecule]
        for path in self.files(root):
            with open_stream(path) as stream:
                for sequence in _sequences(stream, path, code):
                    yield Document(sequence.decode("ascii"))
                    if self.config.reverse_complement:
                        yield Document(sequence[::-1].translate(COMPLEMENT).decode("ascii"))


def _sequences(stream: BinaryIO, path: Path, code: Code) -> Iterator[bytes]:
    """Yield the sequences of a FASTA file, without headers and comments (lines that begin with ``;``)."""
    parts: io.BytesIO | None = None  # None: before the first header
    number, column, comment = 0, 0, False
    while line := stream.readline(MAX_LINE):
        if column == 0:  # at the start of a line, not within a long one
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            comment = line.startswith(b";")
            if line.startswith(b">"):
                if parts is not None:
                    yield parts.getvalue()
                parts, comment = io.BytesIO(), True
                if len(line) == MAX_LINE:
                    raise UserError(f"{path}:{number}: a header of more than {size_text(MAX_LINE)}")
        if not comment and line.strip(BLANKS):
            if parts is None:
                raise UserError(f"{path}:{number}: not FASTA: a record begins with a line '>name', not {_quoted(line)}")
            found = line.translate(code.table, code.skipped)
            if INVALID in found:
                raise _invalid(line, f"{path}:{number}", column, code)
            if parts.tell() + len(found) > MAX_SEQUENCE:
                raise UserError(
                    f"{path}:{number}: a sequence of more than {MAX_SEQUENCE:,} characters, which is the limit"
                )
            parts.write(found)
        column = 0 if line.endswith(b"\n") else column + len(line)
    if parts is not None:
        yield parts.getvalue()


def _invalid(line: bytes, where: str, column: int, code: Code) -> UserError:
    """Return (without raising) the exception for the first character of ``line`` that is none of ``code``."""
    at = next(i for i, byte in enumerate(line) if byte not in code.skipped and code.table[byte] == INVALID[0])
    known = "".join(chr(i) for i in range(65, 91) if code.table[i] != INVALID[0])
    return UserError(
        f"{where}: {_quoted(line[at : at + 1])} at column {column + at + 1} is no {code.name}; known are {known}, in either case"
    )


def _quoted(line: bytes) -> str:
    return repr(line[:20].rstrip(b"\r\n").decode("ascii", "backslashreplace"))
