"""Text to tokens and back, agreement with the ``tokenizers`` library, and what must never be generated."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sedd_graph_registry.data.tokenizers import Characters

from sedd_graph.data.config import DataConfig
from sedd_graph.data.tokenizer import Tokenizer, load_tokenizer
from sedd_graph.errors import UserError

TEXTS = ["the cat sat on the mat, the end\n", "naïve café — 😀 déjà vu\n", "  spaces\tand\r\nlines\n"] * 4
anything = st.text(st.characters(exclude_categories=["Cs"]))


def make(root: Path, texts: list[str] = TEXTS, **section: Any) -> Tokenizer:
    return DataConfig.model_validate({"tokenizer": section}).tokenizer.make(texts, root=root)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make(tmp_path_factory.mktemp("bpe"), op="bpe", size=300)


@pytest.fixture(scope="module")
def byte(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make(tmp_path_factory.mktemp("byte"), op="bytes")


def words(**vocabulary: int) -> Any:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="unk"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return inner


def test_the_alphabet_is_the_most_frequent_characters_ties_by_code_point(tmp_path: Path) -> None:
    made = make(tmp_path, ["zzz", "yyx", "b", "a", "😀c"], op="characters", size=7)
    assert isinstance(made, Characters)
    assert made.alphabet == "abcyz"  # z and y, then the lowest of those seen once


@settings(deadline=None)
@given(st.lists(anything, max_size=8), st.integers(3, 40))
def test_the_alphabet_agrees_with_a_plain_count(texts: list[str], size: int) -> None:
    counts = Counter("".join(texts))
    expected = sorted(sorted(counts, key=lambda c: (-counts[c], c))[: size - 2])
    assert Characters.train(texts, size).alphabet == "".join(expected)


@settings(deadline=None)
@given(anything, st.integers(3, 40))
def test_characters_round_trip_but_for_those_outside(text: str, size: int) -> None:
    made = Characters.train([text], size)
    ids = made.encode(text)
    assert len(ids) == len(text)
    assert made.decode(ids) == "".join(c if c in made.alphabet else "\ufffd" for c in text)


def test_what_characters_forbid(tmp_path: Path) -> None:
    made = make(tmp_path, ["abc"], op="characters", size=8)
    assert (made.size, made.pad, made.end, made.forbidden) == (8, 7, None, (0, 4, 5, 6, 7))
    assert made.encode("cabz\U0010ffff").tolist() == [3, 1, 2, 0, 0]
    assert made.decode([3, 7, 5, 1, -1, 99]) == "ca"


@settings(deadline=None)
@given(anything)
def test_bytes_round_trip_and_agree_with_utf8(byte: Tokenizer, text: str) -> None:
    ids = byte.encode(text)
    assert ids.tolist() == list(text.encode())
    assert byte.decode(ids) == text


@settings(deadline=None)
@given(st.binary())
def test_bytes_decode_anything(byte: Tokenizer, raw: bytes) -> None:
    assert byte.decode(raw) == raw.decode("utf-8", "replace")


def test_what_bytes_forbid(byte: Tokenizer) -> None:
    assert (byte.size, byte.pad, byte.forbidden) == (257, 256, (256,))
    assert byte.decode([104, 256, 105, -1, 300]) == "hi"


@settings(deadline=None)
@given(anything)
def test_bpe_round_trips(bpe: Tokenizer, text: str) -> None:
    if not any(special in text for special in ("<pad>", "<|endoftext|>")):
        assert bpe.decode(bpe.encode(text)) == text


def test_bpe_is_the_same_each_time(tmp_path: Path, bpe: Tokenizer) -> None:
    assert bpe.size == 300
    assert make(tmp_path, op="bpe", size=300).to_json() == bpe.to_json()


def test_what_bpe_forbids(bpe: Tokenizer) -> None:
    assert bpe.forbidden == (bpe.pad,)
    assert bpe.end not in (None, bpe.pad)
    assert bpe.pad is not None
    assert bpe.decode([bpe.pad, *bpe.encode("mat"), bpe.pad]) == "mat"


@settings(deadline=None)
@given(anything)
def test_a_file_agrees_with_the_library(bpe: Tokenizer, text: str) -> None:
    inner = tokenizers.Tokenizer.from_str(bpe.to_json())
    assert bpe.encode(text).tolist() == inner.encode(text, add_special_tokens=False).ids


def test_a_file_that_cuts_and_pads_does_neither_here(tmp_path: Path) -> None:
    inner = words(a=0, b=1, unk=2)
    inner.enable_truncation(5)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "t.json"))
    made = make(tmp_path, op="file", path="t.json")
    assert made.encode("a b " * 20).tolist() == [0, 1] * 20
    assert made.encode("a").tolist() == [0]


def test_ids_that_no_text_has_are_forbidden_and_silent(tmp_path: Path) -> None:
    inner = words(a=0, b=7, unk=9)  # the library gives added tokens the ids from 3 on
    inner.add_special_tokens(["[CLS]", "[SEP]", "[PAD]"])
    inner.save(str(tmp_path / "tokenizer.json"))
    made = load_tokenizer(tmp_path)
    cls, sep, pad = (inner.token_to_id(t) for t in ("[CLS]", "[SEP]", "[PAD]"))
    assert (made.pad, made.end) == (pad, sep)
    assert set(made.forbidden) == set(range(10)) - {0, 7, 9, sep}
    assert cls in made.forbidden
    assert made.decode([0, 1, 2, pad, 7, -1, 10**6]) == "a b"


@pytest.mark.parametrize("section", [{"op": "characters", "size": 30}, {"op": "bytes"}, {"op": "bpe", "size": 290}])
def test_saved_and_loaded_is_the_same(tmp_path: Path, section: dict[str, Any]) -> None:
    made = make(tmp_path, **section)
    (tmp_path / "tokenizer.json").write_text(made.to_json(), encoding="utf-8")
    for back in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")):
        assert (back.size, back.pad, back.end, back.forbidden) == (made.size, made.pad, made.end, made.forbidden)
        assert back.to_json() == made.to_json()
        for text in TEXTS:
            assert back.encode(text).tolist() == made.encode(text).tolist()


def _huge_id() -> str:
    data = json.loads(words(a=0, unk=1).to_str())
    data["model"]["vocab"]["z"] = 40_000_000
    return json.dumps(data)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not JSON: "),
        ("[" * 200_000, "not JSON: nested too deeply"),
        ("[]", "the tokenizers library cannot read it: "),
        ('{"kind": "characters"}', "needs 'alphabet' and a 'size' of at least its length plus 2"),
        (
            '{"kind": "characters", "alphabet": "abc", "size": 4}',
            "needs 'alphabet' and a 'size' of at least its length plus 2",
        ),
        ('{"kind": "characters", "alphabet": "aba", "size": 9}', "'alphabet' has a character twice"),
        (words().to_str(), "it has no tokens"),
        (_huge_id(), "its highest id is 40,000,000; the limit is 2,097,151"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_a_broken_file_is_said_to_be_so(tmp_path: Path, content: str | bytes, expected: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read: No such file"):
        load_tokenizer(tmp_path / "none.json")


def test_half_a_surrogate_pair_is_the_users_fault(bpe: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"lone surrogate, U\+D800"):
        bpe.encode("a\ud800")


WORDS = make(Path("."), ["it's the tree 12 rest. the street! "] * 30, op="bpe", size=320)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.text(
            " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000\u200b\u180e'a1!é中stre<|endoftext|><pad>", max_size=30
        )
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
        max_size=4,
    )
)
def test_many_texts_are_encoded_as_each_alone(texts: list[str]) -> None:
    """Byte-level BPE encodes words once; the library itself encodes whole texts."""
    assert [found.tolist() for found in WORDS.encode_many(texts)] == [WORDS.encode(text).tolist() for text in texts]


def test_only_words_of_gpt2s_pattern_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenizers
    from sedd_graph_registry.data import _words
    from tokenizers import normalizers, pre_tokenizers

    inner = tokenizers.Tokenizer.from_str(WORDS.to_json())
    assert _words.splits_words(inner)
    for name, value in (
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        ("pre_tokenizer", pre_tokenizers.Whitespace()),
        ("normalizer", normalizers.NFC()),
    ):
        other = tokenizers.Tokenizer.from_str(WORDS.to_json())
        setattr(other, name, value)
        assert not _words.splits_words(other)
    inner.add_special_tokens([tokenizers.AddedToken("<x>", lstrip=True)])
    assert not _words.splits_words(inner)
    monkeypatch.setattr(_words, "MAX_WORDS", 3)
    monkeypatch.setattr(_words, "MAX_KEPT", 4)
    words = _words.Words(WORDS.inner)
    for text in ("the tree and the street", "rest and restaurants " * 3, "12 12 12"):
        assert words.encode(text).tolist() == WORDS.encode(text).tolist()
