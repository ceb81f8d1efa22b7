"""Sequences of FASTA files, against Biopython where it is installed, and the messages for other files."""

from __future__ import annotations

import gzip
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from sedd_graph_registry.data import fasta

from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import open_data
from sedd_graph.data.sources import read_corpus
from sedd_graph.errors import UserError

TWO = b">one chromosome\r\nACGT\r\nacgu n\r\n\r\n;a comment\r\n>two\nRYSWKMBDHV-.X\n>empty\n>three\nGATTACA"


def read(root: Path, raw: bytes, name: str = "a.fna", **keys: Any) -> list[str]:
    (root / name).write_bytes(raw)
    corpus = fasta.Fasta(fasta.Fasta.Config(files=[name], **keys))
    return [document.text for document in corpus.documents(root)]


def message(root: Path, raw: bytes, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(root, raw, **keys)
    return str(caught.value).replace(str(root), "ROOT")


def test_records_are_documents_in_upper_case_without_gaps(tmp_path: Path) -> None:
    assert read(tmp_path, TWO) == ["ACGTACGTN", "NNNNNNNNNNN", "", "GATTACA"]
    assert read(tmp_path, gzip.compress(TWO), "a.fna.gz") == read(tmp_path, TWO)
    assert read(tmp_path, b"\xef\xbb\xbf>one\nAC\n") == ["AC"]
    assert read(tmp_path, b">p\nMKvBZ*\n", molecule="protein") == ["MKVXX"]
    (tmp_path / "b.fna").write_bytes(TWO)
    whole = fasta.Fasta(fasta.Fasta.Config(files=["b.fna"]))
    assert [d.text for d in read_corpus(whole, root=tmp_path)] == ["ACGTACGTN", "NNNNNNNNNNN", "GATTACA"]


def test_it_reads_what_biopython_reads(tmp_path: Path) -> None:
    """Sequences, and their reverse complements, of random files with lines of many lengths."""
    seqio = pytest.importorskip("Bio.SeqIO")
    source = random.Random(0)
    for width in (1, 7, 60, 10_000):
        records = ["".join(source.choices("ACGTacgtNn", k=source.randrange(1, 300))) for _ in range(5)]
        lines = [line for i, text in enumerate(records) for line in (f">r{i} x", *(text[k : k + width] for k in range(0, len(text), width)))]  # fmt: skip
        raw = "\n".join(lines).encode()
        found = read(tmp_path, raw, reverse_complement=True)
        theirs = [record.seq.upper() for record in seqio.parse(io.StringIO(raw.decode()), "fasta")]
        assert found == [str(text) for seq in theirs for text in (seq, seq.reverse_complement())]
        assert found[::2] == [text.upper() for text in records]


def test_lines_of_any_length_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasta, "MAX_LINE", 8)
    assert read(tmp_path, b">one\nACGTACGTACGTA\nC\n>b\nTT") == ["ACGTACGTACGTAC", "TT"]
    assert message(tmp_path, b">one\nACGTACGTAC!T\n").startswith("ROOT/a.fna:2: '!' at column 11 is no nucleotide")
    assert message(tmp_path, b">a long name\nACGT\n") == "ROOT/a.fna:1: a header of more than 8 bytes"
    monkeypatch.setattr(fasta, "MAX_SEQUENCE", 10)
    assert "a sequence of more than 10 characters" in message(tmp_path, b">one\nACGTAC\nGTACGT\n")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"LOCUS  NC_1\n", "ROOT/a.fna:1: not FASTA: a record begins with a line '>name', not 'LOCUS  NC_1'"),
        (b"\n;note\nACGT\n", "ROOT/a.fna:3: not FASTA: a record begins with a line '>name', not 'ACGT'"),
        (b">a\nACGT\nAC>GT\n", "ROOT/a.fna:3: '>' at column 3 is no nucleotide; known are ABCDGHKMNRSTUVWXY, in either case"),
        (b">a\nMKV\n>b\nMKL\n", "ROOT/a.fna:4: 'L' at column 3 is no nucleotide; known are ABCDGHKMNRSTUVWXY, in either case"),
        (b">a\nAC\xff\n", "ROOT/a.fna:2: '\\\\xff' at column 3 is no nucleotide; known are ABCDGHKMNRSTUVWXY, in either case"),
        (b">a\nAC\0\n", "ROOT/a.fna:2: '\\x00' at column 3 is no nucleotide; known are ABCDGHKMNRSTUVWXY, in either case"),
    ],
)  # fmt: skip
def test_what_is_no_fasta_names_line_and_column(tmp_path: Path, raw: bytes, said: str) -> None:
    assert message(tmp_path, raw) == said


def test_the_held_out_part_may_not_be_the_other_strand(tmp_path: Path) -> None:
    both, one = (
        {"op": "fasta", "files": [name], **more}
        for name, more in (("a.fna", {"reverse_complement": True}), ("b.fna", {}))
    )
    tokenizer = {"op": "characters", "alphabet": "ACGTN\n"}
    for section in ({"corpus": both}, {"corpus": both, "heldout": both}, {"corpus": one, "heldout": both}):
        with pytest.raises(pydantic.ValidationError, match=r"give data\.heldout a corpus of its own, without repeats"):
            DataConfig.model_validate(section)
    (tmp_path / "a.fna").write_text(">a\n" + "AACG" * 10)
    (tmp_path / "b.fna").write_text(">b\nACGTACGTN")
    data = open_data(
        DataConfig.model_validate({"corpus": both, "heldout": one, "tokenizer": tokenizer, "length": 10}), root=tmp_path
    )
    assert data.tokenizer.size == 8
    seen = {data.tokenizer.decode(row) for row in data.batch(0, 200).tokens}
    assert any("AACGAACG" in text for text in seen)
    assert any("CGTTCGTT" in text for text in seen)
    assert (
        data.tokenizer.decode(data.heldout.take(np.array([0]), 0).tokens[0]) == "ACGTACGTN\n"
    )  # a line break ends a record
    with pytest.raises(pydantic.ValidationError, match="of DNA alone"):
        fasta.Fasta.Config(files=["a"], molecule="protein", reverse_complement=True)
