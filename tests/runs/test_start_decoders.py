"""Small decoders of the transformers library, by the shipped tables: the embeddings and heads too, and their logits under
the causal mask."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine
from sedd_graph.runs.start import read_start
from tests.conftest import ROOT
from tests.registry.test_backbone import TEXT

transformers = pytest.importorskip("transformers", reason="the extra 'hub' is not installed")
CPU = torch.device("cpu")
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 12,
    "rope_theta": 1000.0,
}
SIZES = [f"params.{k}={v}" for k, v in {"dim": 32, "heads": 4, "kv_heads": 2, "hidden": 64, "depth": 2, "tokens": 12, "theta": 1000}.items()]  # fmt: skip


def decoder(folder: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, "rms_norm_eps": 1e-5, **changes})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return model


def test_a_tied_decoder_is_itself_under_the_causal_mask(tmp_path: Path) -> None:
    theirs = decoder(tmp_path, tie_word_embeddings=True)
    report = check(ROOT / "blueprints" / "smollm2-blocks.yaml", [*SIZES, "data=null", "train=null"])
    start = read_start(report, tmp_path, None, lambda text: None)
    assert start.map == "llama"
    assert {entry.status for entry in start.entries} == {"matched", "rows"}
    engine = make_engine(report, device=CPU, compile="off")
    start.load(engine)
    tokens = torch.randint(0, 12, (2, 9), generator=torch.Generator().manual_seed(1))
    sees = torch.eye(18, dtype=torch.bool)
    sees[:9, :9] = torch.ones(9, 9).tril().bool()
    head: Any = engine.model.get_submodule("head")
    head.config = head.config.model_copy(update={"mask": "hidden"})
    inputs = {"tokens": tokens, "clean": tokens, "places": torch.arange(9).repeat(2), "sees": sees}
    with torch.no_grad():
        ours = engine.model.eval().run(inputs)[0]["log_x0"][..., :12]
        torch.testing.assert_close(ours, theirs(tokens).logits.log_softmax(-1), rtol=1e-4, atol=1e-5)


def test_a_backbone_takes_embeddings_and_head(tmp_path: Path) -> None:
    """The node ``transformers_backbone`` with the decoder's own embeddings and head, whose mask row is the mean."""
    theirs = decoder(tmp_path, tie_word_embeddings=False, vocab_size=12)
    text = TEXT.format(kind="llama", more=", num_key_value_heads: 2, rope_theta: 1000.0")
    (tmp_path / "backbone.yaml").write_text(text)
    report = check(tmp_path / "backbone.yaml")
    start = read_start(report, tmp_path, None, lambda text: None)
    assert start.map == "decoder"
    status = {entry.name: entry.status for entry in start.entries}
    assert (status["embed.embed.weight"], status["head.weight"]) == ("rows", "rows")
    assert {name for name, found in status.items() if found == "new"} == {n for n in status if n.startswith("time.")} | {"head.bias"}  # fmt: skip
    assert "left" not in status.values()
    engine = make_engine(report, device=CPU, compile="off")
    found = start.load(engine)
    head = theirs.lm_head.weight.detach()
    assert torch.equal(found["head.weight"][:-1], head)
    assert torch.equal(engine.model.state_dict()["head.weight"][-1], head.mean(0))
    assert torch.equal(found["embed.embed.weight"][:-1], theirs.model.embed_tokens.weight.detach())
    assert torch.equal(found["trunk.inner.layers.1.mlp.up_proj.weight"], theirs.model.layers[1].mlp.up_proj.weight)
