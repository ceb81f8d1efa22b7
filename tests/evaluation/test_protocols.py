"""Protocols of published tables: rows against plain recounts of the public code, wrong files, records."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sedd_graph_registry.data.prepared import Published, Text8

from sedd_graph.cli.main import run
from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import open_data
from sedd_graph.errors import UserError
from sedd_graph.evaluation.detokenize import DETOKENIZERS
from sedd_graph.evaluation.protocols import (
    PROTOCOLS,
    KnownTokenizer,
    TableProtocol,
    find_protocol,
    protocol_rows,
    require_tokenizer,
)
from sedd_graph.runs.open import Run, open_run
from sedd_graph.runs.protocol import evaluate_protocol
from tests.conftest import SMALL
from tests.data.shard_sets import texts, write_jsonl

BYTES = KnownTokenizer("bytes", 257, begin=1, end=2, probes=(("ab", (97, 98)),))
TEXT = ("abc def " * 400)[:3000]


def changed(name: str, /, **changes: Any) -> TableProtocol:
    return dataclasses.replace(PROTOCOLS[name], **changes)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ('wikitext', " the u.s. ' s n't N N $ 1 <unk> \n x", " the u.s.'s n't 1 N $ 1 <unk>\nx"),
        ('wikitext', '1 @,@ 000 @-@ m ( a b ) [ c ] " q q " \' tis \' = = X', '1,000-m (a b) [c] "q q" \'tis\' == X'),
        ('ptb', "s n't N N N $ 1 \\/ # 1 <unk> \n x 's", "sn't 1 1 1 $1 / #1 ?\nx's"),
        ('lm1b', 'he said . http : / / w ? ( a b ) £ 3 \' tis \' $ 4 " q q " what !', 'he said. http://w? (a b) £3 \'tis\' $4 "q q" what!'),
        ('lm1b', 'Mr J . and it ?', 'Mr J. and it?'),
        ('lambada', ' “ Hi ” he said ', '\n" Hi " he said'),
        ('scientific_papers', 'a @-@ b ( x ) $ 1 : c', 'a-b (x) $1: c'),
        ("none", " a . ", " a . "),
    ],
)  # fmt: skip
def test_detokenizers(name: str, text: str, expected: str) -> None:
    """The expected texts were made by the public code of MDLM."""
    assert DETOKENIZERS[name](text) == expected


def tokenizer() -> Any:
    return DataConfig.model_validate({"tokenizer": "bytes"}).tokenizer.make((), root=Path("."))


def rows_of(protocol: TableProtocol, documents: list[str]) -> tuple[np.ndarray, np.ndarray]:
    data, sizes = protocol_rows(protocol, documents, tokenizer(), DataConfig())
    found = data.heldout.take(np.arange(data.heldout.count), 0)
    assert sizes["rows"] == len(found.tokens)
    assert sizes["counted_tokens"] == found.loss.sum()
    assert np.array_equal(found.loss, found.corrupt)
    assert np.array_equal(found.loss, found.attend)
    return found.tokens, found.loss


def test_framed_rows_are_those_of_mdlm() -> None:
    """As ``_group_texts`` of its code makes them, of 7 documents at a time."""
    documents = texts(40)
    found, counted = rows_of(changed("openwebtext", tokenizer=BYTES, length=32, group=7), documents)
    expected = []
    for first in range(0, 40, 7):
        joined = list(itertools.chain(*([*document.encode(), 2] for document in documents[first : first + 7])))
        expected += [[1, *joined[i : i + 30], 2] for i in range(0, len(joined) // 30 * 30, 30)]
    assert found.tolist() == expected
    assert counted.all()


def test_cut_rows_are_those_of_sedd() -> None:
    documents = texts(40)
    found, counted = rows_of(changed("ptb-sedd", tokenizer=BYTES, length=32, group=9), documents)
    clean = [DETOKENIZERS["ptb"](document) for document in documents]
    expected = []
    for first in range(0, 40, 9):
        joined = list(itertools.chain(*([*document.encode(), 2] for document in clean[first : first + 9])))
        expected += [joined[i : i + 32] for i in range(0, len(joined) // 32 * 32, 32)]
    assert found.tolist() == expected
    assert counted.all()


def test_padded_rows_are_those_of_mdlm_without_wrap() -> None:
    documents = ["", *texts(20)]
    found, counted = rows_of(changed("lm1b", tokenizer=BYTES, length=24, detokenizer="none"), documents)
    expected = [[1, *document.encode()[:22], 2] for document in documents]
    assert [row[mask].tolist() for row, mask in zip(found, counted, strict=True)] == expected
    assert (found[~counted] == 256).all()


def test_text8_rows_are_the_last_part_in_whole_rows(tmp_path: Path) -> None:
    letters = changed("text8", length=32)
    found, _ = rows_of(letters, [TEXT])
    assert bytes(found.reshape(-1).tolist()).decode() == TEXT[: 3000 // 32 * 32]


def test_the_table_of_protocols() -> None:
    assert {"text8", "lm1b", "lm1b-packed", "openwebtext", "wikitext103", "wikitext103-sedd"} <= set(PROTOCOLS)
    assert PROTOCOLS["text8"].length == 256
    assert PROTOCOLS["lm1b"].length == 128
    assert all(
        protocol.length == 1024
        for protocol in PROTOCOLS.values()
        if protocol.tokenizer and protocol.tokenizer.name == "gpt2"
    )
    for protocol in PROTOCOLS.values():
        json.dumps(protocol.facts())
    with pytest.raises(UserError, match=r"unknown protocol 'wikitext13' \(did you mean 'wikitext103'"):
        find_protocol("wikitext13")


def test_another_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="counts tokens of gpt2; the run has another tokenizer, of 257 tokens"):
        require_tokenizer(PROTOCOLS["ptb"], tokenizer())
    require_tokenizer(changed("ptb", tokenizer=BYTES), tokenizer())
    wrong = dataclasses.replace(BYTES, probes=(("ab", (98, 97)),))
    with pytest.raises(UserError, match="counts tokens of bytes"):
        require_tokenizer(changed("ptb", tokenizer=wrong), tokenizer())
    require_tokenizer(PROTOCOLS["text8"], tokenizer())
    few = DataConfig.model_validate({"tokenizer": {"op": "characters", "size": 20}}).tokenizer
    with pytest.raises(UserError, match="one token for each of the 27 characters"):
        require_tokenizer(PROTOCOLS["text8"], few.make(["abc"], root=Path(".")))


class SmallText8(Text8):
    published = Published(hashlib.md5(TEXT.encode(), usedforsecurity=False).hexdigest(), (2000, 500, 500))


def small_text8(part: str, file: str = "text8") -> SmallText8:
    return SmallText8(SmallText8.Config.model_validate({"file": file, "part": part}))


def test_text8_is_divided_and_another_file_refused(tmp_path: Path) -> None:
    (tmp_path / "text8").write_text(TEXT)
    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
        archive.writestr("text8", TEXT)
    for file in ("text8", "text8.zip"):
        parts = [next(small_text8(part, file).documents(tmp_path)).text for part in ("train", "valid", "test")]
        assert parts == [TEXT[:2000], TEXT[2000:2500], TEXT[2500:]]
    config = DataConfig(corpus=small_text8("train"), heldout=small_text8("valid"), length=32)
    data = open_data(config, root=tmp_path)
    assert data.tokenizer.decode(data.heldout.take(np.arange(15), 0).tokens.ravel()) == TEXT[2000:2480]
    assert data.characters_per_token == 1.0
    (tmp_path / "text8").write_text(TEXT[:-1] + "z")
    with pytest.raises(
        UserError, match=r"text8 is not the file text8: it has 3,000 bytes and MD5 [0-9a-f]{32}, not 3,000"
    ):
        list(small_text8("test").documents(tmp_path))
    with pytest.raises(UserError, match="not 100,000,000 and 3bea1919949baf155f99411df5fada7e"):
        list(Text8(Text8.Config(part="test")).documents(tmp_path))
    with zipfile.ZipFile(tmp_path / "deflated.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text8", TEXT)
    damaged = bytearray((tmp_path / "deflated.zip").read_bytes())
    damaged[35] = 0xFF  # the first byte of the compressed text: a block of no known type
    for bad in (
        b"PK\x03\x04 and no more",
        bytes(damaged),
        (tmp_path / "text8.zip").read_bytes().replace(b"text8", b"text9"),
    ):
        (tmp_path / "bad.zip").write_bytes(bad)
        with pytest.raises(UserError, match="cannot be read as a zip archive with a file 'text8'"):
            list(small_text8("test", "bad.zip").documents(tmp_path))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("protocols")
    (root / "letters.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    corpus = "data: {corpus: {op: text, files: [letters.txt]}, tokenizer: {op: characters, size: 128}"
    (root / "small.yaml").write_text(SMALL.replace("data: {tokenizer: {op: characters, size: 128}", corpus))
    arguments = ["--runs", str(root / "runs"), "--path-to", str(root / "at"), "--proof", "quick", "--device", "cpu"]
    assert run(["build", str(root / "small.yaml"), *arguments]) == 0
    return open_run((root / "at").read_text(), device=torch.device("cpu"), compile="off")


def test_an_evaluation_records_its_protocol(built: Run, tmp_path: Path) -> None:
    (tmp_path / "text8").write_text(TEXT)
    said: list[str] = []
    found = evaluate_protocol(
        built,
        changed("text8", length=32),
        [str(tmp_path / "text8")],
        said.append,
        corpus=small_text8("test", str(tmp_path / "text8")),
    )
    record = json.loads((built.path / "evaluation-text8.json").read_text())
    table = record["protocol"]["table"]
    assert record["bits_per_character"] == found.bits_per_character
    assert record["sequences"] == table["rows"] == 500 // 32
    assert table["text_sha256"] == hashlib.sha256(TEXT[2500:].encode() + b"\xff").hexdigest()
    assert (table["length"], table["unit"], table["files"]) == (32, "bits_per_character", ["text8"])
    assert said[-1].startswith("table       text8: bits per character at most ")
    # the bound in nats, by hand: one character is one token
    assert record["bits_per_character"] == pytest.approx(record["nats_per_token"] / np.log(2))
    from sedd_graph.report.html import write_report

    page = write_report(built.path).read_text()
    assert "bits per character, text8 (upper bound)" in page
    assert "text8, the last 5 million characters; 15 rows of 32 tokens" in page


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
def test_files_of_each_kind_hold_the_same_documents(built: Run, tmp_path: Path, kind: str) -> None:
    letters = KnownTokenizer("letters", 20, 0, 127, ())
    lines = ["the lazy dog s ' tail", "", "brown fox N N jumps"] * 20
    path = tmp_path / f"ptb.{kind}"
    if kind == "txt":
        path.write_text("".join(f" {line} \n" for line in lines))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"sentence": line}) + "\n" for line in lines))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([{"sentence": line} for line in lines]), path)
    protocol = changed("ptb", name=f"ptb-{kind}", documents=60, length=32, tokenizer=letters)
    evaluate_protocol(built, protocol, [str(path)], lambda text: None)
    table = json.loads((built.path / f"evaluation-ptb-{kind}.json").read_text())["protocol"]["table"]
    assert (
        table["text_sha256"] == hashlib.sha256("".join(f"{line}\xff" for line in lines).encode("latin-1")).hexdigest()
    )
    for documents, held in ((59, "more"), (61, "60")):
        with pytest.raises(UserError, match=f"has {documents} documents; the files hold {held}"):
            evaluate_protocol(built, dataclasses.replace(protocol, documents=documents), [str(path)], lambda text: None)


def test_the_last_documents_of_a_whole_set_are_taken(built: Run, tmp_path: Path) -> None:
    letters = KnownTokenizer("letters", 20, 0, 127, ())
    path = write_jsonl(tmp_path / "owt.jsonl", [f"{'the lazy dog ' * 9} {i}" for i in range(30)])
    protocol = changed("openwebtext", documents=10, of=30, length=32, tokenizer=letters)
    evaluate_protocol(built, protocol, [str(path)], lambda text: None)
    table = json.loads((built.path / "evaluation-openwebtext.json").read_text())["protocol"]["table"]
    last = "".join(f"{'the lazy dog ' * 9} {i}\xff" for i in range(20, 30))
    assert table["text_sha256"] == hashlib.sha256(last.encode("latin-1")).hexdigest()
    with pytest.raises(UserError, match="has 10 documents, or 31 in all; the files hold 30"):
        evaluate_protocol(built, dataclasses.replace(protocol, of=31), [str(path)], lambda text: None)


def test_lines_of_wikitext_keep_their_breaks(tmp_path: Path) -> None:
    from sedd_graph.inputs.confine import allow_outside
    from sedd_graph.runs.protocol import _documents

    (tmp_path / "wiki.valid.raw").write_text(" \n = Title = \n \n text , of it . \n")
    with allow_outside():
        found = list(_documents(PROTOCOLS["wikitext103"], [str(tmp_path / "wiki.valid.raw")]))
        assert found == ["", " = Title = \n", "", " text , of it . \n"]
        assert list(_documents(PROTOCOLS["ptb"], [str(tmp_path / "wiki.valid.raw")]))[1] == "= Title ="


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--protocol", "text8"],
            "--protocol text8 reads text8, the last 5 million characters: name its file with --files",
        ),
        (["--protocol", "text9", "--files", "a"], "unknown protocol 'text9' (did you mean 'text8'?)"),
        (["--protocol", "text8", "--files", "a"], "'text8' has rows of 256 tokens; this run was built for 32"),
        (["--files", "a"], "--files holds the text of --protocol"),
        (["--protocol", "text8", "--files", "a", "--samples"], "--protocol and --files are for the bound"),
        (["--protocol", "text8", "--files", "a", "--likelihood", "ode"], "are for the run's own held-out text"),
    ],
)
def test_what_the_command_refuses(built: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:  # fmt: skip
    assert run(["eval", str(built.path), "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_reference_lists_every_protocol_with_its_number_of_documents() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "evaluation.md").read_text()
    section = page.split("## Published benchmarks")[1].split("\n## ")[0]
    for name, protocol in PROTOCOLS.items():
        assert f"`{name}`" in section
        if protocol.documents is not None:
            assert f"{protocol.documents:,}" in section
        assert f"{protocol.length:,}" in section
