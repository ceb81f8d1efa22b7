"""Vectors of a frozen encoder: those of the transformers library, read safely, and refused where they are others."""

from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from safetensors.torch import load_file, save_file

import sedd_graph
from sedd_graph.component.base import Context
from sedd_graph.errors import UserError
from tests.conftest import ROOT

transformers = pytest.importorskip("transformers")

from sedd_graph_registry.vectors.encoded import EncodedGaussian, encoder_digest  # noqa: E402  # after the skip

T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 12}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 12}


def saved(folder: Path, kind: str = "t5", seed: int = 0) -> Any:
    """Save an encoder of random weights to ``folder``, and return it."""
    torch.manual_seed(seed)
    if kind == "t5":
        model = transformers.T5EncoderModel(transformers.T5Config(**T5))
    else:
        model = transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "encoder"


def kernel(folder: Path, **changes: Any) -> EncodedGaussian:
    config = {"vocab": 10, "width": 16, "encoder": folder.name, "sha256": encoder_digest(folder), **changes}
    return EncodedGaussian(EncodedGaussian.Config(**config), Context({"n": 10}))


@pytest.mark.parametrize("kind", ["t5", "bert"])
@torch.no_grad()
def test_vectors_are_the_last_hidden_states_of_the_library(folder: Path, kind: str) -> None:
    model = saved(folder, kind)
    made = kernel(folder, mean=0.1, std=0.5)
    tokens = torch.randint(0, 10, (3, 7), generator=torch.Generator().manual_seed(1))
    attend = torch.ones_like(tokens, dtype=torch.bool)
    attend[1, 4:] = False
    expected = (model(input_ids=tokens, attention_mask=attend.long()).last_hidden_state - 0.1) / 0.5
    found = made.embed(tokens, attend)
    assert torch.allclose(found[attend], expected[attend], atol=1e-5)
    assert not found[~attend].any()
    alone = (model(input_ids=tokens[:1, :3]).last_hidden_state - 0.1) / 0.5
    given = torch.arange(7)[None] < 3
    seen = made.embed(tokens[:1], attend[:1], given)
    assert torch.allclose(seen[0, :3], alone[0], atol=1e-5)  # a prompt is encoded without what follows
    assert torch.allclose(seen[0, 3:], found[0, 3:], atol=1e-5)


def test_the_encoder_is_neither_trained_nor_saved(folder: Path) -> None:
    saved(folder)
    made = kernel(folder)
    assert not made.embed(torch.zeros(1, 3, dtype=torch.int64)).requires_grad
    assert not made.learned
    assert not list(made.parameters())
    assert not made.state_dict()


def test_another_encoder_is_refused(folder: Path) -> None:
    saved(folder)
    made = kernel(folder)
    saved(folder, seed=1)
    with pytest.raises(
        UserError, match=rf"another encoder than the one declared: its SHA-256 is {encoder_digest(folder)}"
    ):
        made.embed(torch.zeros(1, 3, dtype=torch.int64))


def test_rows_without_known_tokens_need_no_encoder(folder: Path) -> None:
    made = EncodedGaussian(
        EncodedGaussian.Config(vocab=10, width=16, encoder="nowhere", sha256="0" * 64), Context({"n": 10})
    )
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    assert not made.embed(tokens, tokens > 0, tokens > 0).any()
    with pytest.raises(UserError, match="there is no folder"):
        made.embed(tokens)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"width": 8}, "and width: 16"), ({"vocab": 13}, "gives 12 tokens"), ({"encoder": ".."}, "outside")],
)
def test_an_encoder_that_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], told: str) -> None:
    saved(folder)
    with pytest.raises(UserError, match=told):
        kernel(folder, **changes).embed(torch.zeros(1, 3, dtype=torch.int64))


def test_pickled_weights_are_refused(folder: Path) -> None:
    saved(folder)
    digest = encoder_digest(folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="other formats can hold code"):
        kernel(folder, sha256=digest).embed(torch.zeros(1, 3, dtype=torch.int64))


def test_an_incomplete_encoder_is_refused(folder: Path) -> None:
    saved(folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.block.1.layer.1.DenseReluDense.wo.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no weights for encoder\.block\.1"):
        kernel(folder).embed(torch.zeros(1, 3, dtype=torch.int64))


def test_an_encoder_without_digest_is_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="sha256sum"):
        EncodedGaussian.Config(vocab=4, width=2, encoder="folder")


def test_a_model_trains_with_the_encoder_and_samples_without(folder: Path) -> None:
    saved(folder)
    changes = [
        "params.dim=16",
        "params.heads=2",
        "params.depth=1",
        "params.cond=8",
        "params.width=16",
        "params.tokens=10",
    ]
    changes += [f"process.encoder={folder.name}", f"process.sha256={encoder_digest(folder)}", "sample.steps=2"]
    blueprint = ROOT / "blueprints" / "elf-tiny.yaml"
    engine = sedd_graph.build(blueprint, overrides=[*changes, "data=null", "train=null"], device="cpu", compile="off")
    rows = torch.randint(0, 10, (4, 6), generator=torch.Generator().manual_seed(4))
    engine.loss(rows).mean().backward()
    assert torch.isfinite(
        engine.process.bound_rows(
            engine.network, engine.process.batch(rows, engine.device), [range(len(rows))], seeds=[0]
        )
    ).all()
    assert sum(p.numel() for p in engine.model.parameters()) < 20_000
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    other = sedd_graph.build(blueprint, overrides=[*changes, "data=null", "train=null"], device="cpu", compile="off")
    other.model.load_state_dict(engine.model.state_dict())
    assert other.sample(batch=2, length=6, seed=0).shape == (2, 6)
    with pytest.raises(UserError, match="there is no folder"):
        other.loss(rows)
