"""Every built-in graph component is held to its contract; components broken on purpose are caught by name."""

from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float
from sedd_graph_registry import arithmetic, attention, backbone, feedforward, head, mixer, modulation, norm, time
from torch import Tensor, nn

from sedd_graph.component import Component, ComponentConfig, Context
from sedd_graph.testing import ConformanceError, check_component

BUILT_IN: list[tuple[type[Component], dict[str, Any], tuple[str, ...]]] = [
    (arithmetic.Add, {}, ()),
    (arithmetic.Mean, {}, ()),
    (arithmetic.Scale, {"by": 2.0}, ()),
    (arithmetic.Permute, {"pattern": "b l d -> b d l"}, ()),
    (arithmetic.Split, {"sizes": [3, 5]}, ()),
    (attention.Attention, {"heads": 2}, ()),
    (attention.Attention, {"heads": 2, "qk_norm": "rms", "bias": "all"}, ("angles", "attend")),
    (feedforward.FeedForward, {}, ()),
    (head.ScoreHead, {}, ()),
    (head.X0Head, {"mask": "none"}, ()),
    (mixer.ShortConv, {}, ()),
    (mixer.ShortConv, {"width": 5}, ("attend",)),
    (modulation.AdaLNModulate, {}, ()),
    (modulation.AdaLNGate, {}, ()),
    (norm.LayerNorm, {}, ()),
    (norm.RMSNorm, {}, ()),
    (time.SigmaEmbedding, {}, ()),
    (time.GaussianFourier, {}, ()),
    (time.LearnedTime, {}, ()),
    (time.ConditionAdd, {}, ()),
]


@pytest.mark.parametrize(("cls", "config", "connected"), BUILT_IN, ids=lambda v: getattr(v, "__name__", None))
def test_built_in(cls: type[Component], config: dict[str, Any], connected: tuple[str, ...]) -> None:
    check_component(cls, config, connected=connected)


class WrongShape(Component, kind="norm"):
    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return x[..., :-1]


class Writes(Component, kind="norm"):
    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return x.mul_(2.0)


class Random(Component, kind="norm"):
    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return x + torch.rand_like(x)


class Idle(Component, kind="norm"):
    class Config(ComponentConfig):
        pass

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return x * 1.0 + 0.0 * self.unused.sum()


class Leaks(Component, kind="mixer"):
    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b l d"], attend: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b l d"]:
        return x + x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("cls", "check"),
    [(WrongShape, "shape"), (Writes, "purity"), (Random, "determinism"), (Idle, "gradient"), (Leaks, "padding")],
)
def test_broken(cls: type[Component], check: str) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_component(cls)
    assert check in {name for name, _ in caught.value.failures}


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 8}
KINDS = {"llama": {"num_key_value_heads": 2}, "bert": {}, "modernbert": {"pad_token_id": 0}}


@pytest.mark.parametrize("kind", KINDS)
def test_backbone_sees_both_ways(kind: str) -> None:
    pytest.importorskip("transformers")
    cls = backbone.TransformersBackbone
    config = cls.Config.model_validate({"config": {"model_type": kind, **SMALL, **KINDS[kind]}})
    node = cls(config, Context({"d": 16})).eval()
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, -1] += torch.linspace(-1, 1, 16)
    attend = torch.tensor([[True] * 5 + [False]])
    with torch.no_grad():
        assert not torch.allclose(node(x)[:, 0], node(changed)[:, 0], atol=1e-6)
        assert torch.allclose(node(x, None, attend)[:, :5], node(changed, None, attend)[:, :5], atol=1e-5)
