"""The blocks of reversible.yaml in one blueprint: the solver derives their claims, and both memory modes train alike."""

from pathlib import Path

import pytest
import torch

import sedd_graph
from sedd_graph.inverse.claims import derive
from sedd_graph.inverse.program import Program

TEXT = """
blueprint: 1
name: blocks
use: {rev: "sedd_graph:blocks/reversible.yaml"}
axes: {b: batch, h: length, l: 2*h, d: 16, e: 8, v: 13}
inputs: {tokens: int b l, sigma: float b, attend: bool b l}
outputs: {log_score: head}
blocks:
  halves:
    description: One half of the sequence sees the other.
    invertible: {given: [attend], level: volume_preserving}
    inputs: {x: float b 2*h d, attend: bool b 2*h}
    outputs: {x: out}
    nodes:
      part: {op: split_sequence, in: x, with: {mode: interleave}}
      seen: {op: split_sequence, in: attend, with: {mode: interleave, of: mask}}
      f: {op: attention, in: {x: part.x0, attend: seen.x0}, with: {heads: 2}}
      sum: {op: add, in: [part.x1, f]}
      whole: {op: join_sequence, in: [sum, part.x0], with: {mode: interleave}}
      out: {op: roll, in: {x: whole, attend: attend}}
nodes:
  embed: {op: token_embedding, in: tokens, out: float b l d, with: {vocab: v}}
  time: {op: sigma_embedding, in: sigma, out: float b e}
  rope: {op: rotary, in: embed.out, with: {dim: 8}}
  rope4: {op: rotary, in: embed.out, with: {dim: 4}}
  two: {block: rev.two_stream, repeat: 2, in: {x1: embed.out, x2: embed.out, c: time, angles: rope}, with: {heads: 2}, memory: store}
  leap: {block: rev.leapfrog, repeat: 2, in: {before: two.x1, x: two.x2, c: time, angles: rope}, with: {heads: 2}, memory: store}
  affine: {block: rev.affine_coupling, repeat: 2, in: {x: leap.x, c: time, angles: rope4}, with: {heads: 2}, memory: store}
  contraction: {block: rev.contraction, repeat: 2, in: {x: affine, c: time}, with: {heads: 2}, memory: store}
  plu: {block: rev.mix_plu, in: contraction, memory: store}
  mixed: {block: rev.mixed_layer, repeat: 2, in: {x: plu, c: time, angles: rope}, with: {heads: 2}}
  halves: {block: halves, repeat: 2, in: {x: mixed, attend: attend}, memory: store}
  join: {op: mean, in: [halves, leap.before]}
  head: {op: score_head, in: {x: join, tokens: tokens, sigma: sigma}, out: float b l v}
process: {op: absorb, schedule: {op: loglinear}}
objective: {op: score_entropy}
sample: {op: analytic, steps: 4}
"""


@pytest.fixture
def blueprint(tmp_path: Path) -> Path:
    path = tmp_path / "blocks.yaml"
    path.write_text(TEXT)
    return path


def test_claims_are_derived(blueprint: Path) -> None:
    derived = derive(sedd_graph.check(blueprint).graph)
    assert {found.problem for found in derived} == {None}
    programs = {found.region.label: found.found for found in derived if isinstance(found.found, Program)}
    assert {name: program.level for name, program in programs.items()} == {
        "two_stream": "volume_preserving",
        "leapfrog": "volume_preserving",
        "affine_coupling": "bijective",
        "contraction": "bijective",
        "mix": "bijective",
        "mix_plu": "bijective",
        "halves": "volume_preserving",
    }


def test_reversible_gradients_equal_stored_ones(blueprint: Path) -> None:
    tokens = torch.randint(0, 12, (3, 10), generator=torch.Generator().manual_seed(0))
    found = []
    for memory in ("store", "reversible"):
        blueprint.write_text(TEXT.replace("memory: store}\n", f"memory: {memory}}}\n"))
        engine = sedd_graph.build(blueprint, device="cpu", compile="off")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in engine.model.parameters():  # gates and heads start at zero, so that no gradient would pass
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        engine.model.train()
        for _ in range(2):  # the first batch initialises act_norm
            torch.manual_seed(5)
            engine.model.zero_grad(set_to_none=True)
            loss = engine.loss(tokens)
            loss.sum().backward()
        found.append({n: p.grad for n, p in engine.model.named_parameters()} | {"loss": loss.detach()})
    stored, reversible = found
    for name, value in stored.items():
        assert value is not None, name
        other = reversible[name]
        assert other is not None, name
        assert (other - value).norm() <= 1e-3 * value.norm() + 1e-6, name
