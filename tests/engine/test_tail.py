"""Head and loss at a few positions at a time: the numbers of whole rows, in bounded memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sedd_graph
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.tokens.groups import Groups, group, group_size
from sedd_graph.engine import tail as tails
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.measure import measure
from sedd_graph.engine.peak import PeakMemory
from sedd_graph.families.token_loss import TokenLoss
from sedd_graph.runs.check import check

NETWORK = """blueprint: 1
name: end
axes: {{b: batch, l: length, d: {d}, e: 16, v: "{v}"}}
inputs: {{tokens: int b l, sigma: float b}}
outputs: {{{output}: head}}
nodes:
  embed: {{op: token_embedding, in: tokens, out: float b l d, with: {{vocab: v, init: kaiming}}}}
  time: {{op: sigma_embedding, in: sigma, out: float b e}}
  norm: {{op: layer_norm, in: embed.out{save}}}
  modulate: {{op: adaln_modulate, in: {{x: norm, c: time}}}}
  head: {head}
process: {{op: {kernel}, schedule: {{op: {schedule}}}}}
objective: {{op: {objective}}}
sample: {{op: analytic, steps: 8}}
"""
SCORES = "{op: score_head, in: {x: modulate, tokens: tokens, sigma: sigma}, out: float b l v, with: {scale: none}}"
X0 = "{op: x0_head, in: {x: modulate, tokens: tokens}, out: float b l v, with: {mask: MASK}}"
CASES = {
    # name: kernel, output, head, objective, schedule
    "score_entropy": ("absorb", "log_score", SCORES, "score_entropy", "loglinear"),
    "nelbo": ("absorb", "log_x0", X0.replace("MASK", "last"), "nelbo", "loglinear"),
    "masked_count": ("absorb", "log_x0", X0.replace("MASK", "last"), "masked_count", "loglinear"),
    "d3pm": ("absorb", "log_x0", X0.replace("MASK", "last"), "d3pm", "loglinear"),
    "uniform": ("uniform", "log_x0", X0.replace("MASK", "none"), "nelbo", "geometric"),
}


def network(folder: Path, case: str, *, d: int, v: int, save: str = "", mode: Any = "off") -> Engine:
    kernel, output, head, objective, schedule = CASES[case]
    path = folder / "end.yaml"
    names = {"kernel": kernel, "output": output, "head": head, "objective": objective, "schedule": schedule}
    path.write_text(NETWORK.format(d=d, v=v, save=save, **names))
    engine = sedd_graph.build(path, device="cpu", compile=mode)
    spread(engine)
    return engine


def spread(engine: Engine) -> None:
    """Give all weights values: the gradients of zeros would hide those before them."""
    for p in engine.model.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(p.numel()))


def rows(engine: Any, count: int, length: int, *, masked: bool = True) -> tuple[Any, Batch, Tensor]:
    """Return a draw, its batch with random prompts and padding, and dropout keys."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, engine.process.kernel.data_tokens, (count, length), generator=generator)
    batch = Batch.of(tokens)
    if masked:
        corrupt, loss = (torch.rand(count, length, generator=generator) < 0.9 for _ in range(2))
        attend = torch.arange(length).expand(count, length) < length - 3
        batch = Batch(tokens, attend, corrupt & attend, loss & attend)
    random = Randomness(torch.Generator().manual_seed(1))
    return engine.draw(batch, random=random), batch, random.keys(count)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Context in which losses are evaluated on whole rows."""

    class Context:
        def __enter__(self) -> None:
            monkeypatch.setattr(TokenLoss, "tail", lambda *_, **__: None)

        def __exit__(self, *_: object) -> None:
            monkeypatch.undo()

    return Context


def gradients(engine: Engine, drawn: Any, factors: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    engine.model.zero_grad(set_to_none=True)
    loss = engine.trained(*drawn)[0]
    (loss if factors is None else loss * factors).sum().backward()
    return loss.detach(), {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}


def same(engine: Engine, drawn: Any, whole: Callable[[], Any], factors: Tensor | None, rtol: float = 2e-6) -> None:
    loss, found = gradients(engine, drawn, factors)
    with whole():
        expected, true = gradients(engine, drawn, factors)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert found.keys() == true.keys()
    for name, value in true.items():
        assert (found[name] - value).norm() <= rtol * value.norm() + 1e-9, name


TINY = ("bd3lm-tiny", "d3pm-tiny", "mdlm-tiny", "mixture-tiny", "neighbours-tiny", "power-tiny", "sedd-reversible-tiny")


@pytest.mark.parametrize("name", TINY)
def test_losses_and_gradients_are_those_of_whole_rows(name: str, whole: Callable[[], Any]) -> None:
    engine = sedd_graph.build(f"blueprints/{name}.yaml", ["params.depth=1"], device="cpu", compile="off")
    spread(engine)
    engine.model.train()
    tail = engine.process.tail(engine.model)
    assert tail is not None
    assert [node for node, _ in tail.split.steps] == ["norm", "modulate", "head"]
    drawn = rows(engine, 5, 64)
    for factors in (None, torch.rand(5, generator=torch.Generator().manual_seed(2))):
        same(engine, drawn, whole, factors)


def test_under_autocast_the_head_is_in_float32(tmp_path: Path, whole: Callable[[], Any]) -> None:
    engine = network(tmp_path, "nelbo", d=32, v=300)
    drawn = rows(engine, 4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = gradients(engine, drawn, None)
    with whole(), torch.autocast("cpu", torch.bfloat16):
        expected = engine.trained(*drawn)[0]
    engine.model.zero_grad(set_to_none=True)
    expected.sum().backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0.0)
    for name, p in engine.model.named_parameters():
        assert p.grad is not None
        near = 1e-5 if name.startswith("head") else 1e-2  # bfloat16 rounds the gradients of its activations
        assert (found[name] - p.grad).norm() <= near * p.grad.norm(), name


@pytest.mark.parametrize("name", ["genmd4-tiny", "rates-tiny", "d3pm-gaussian-tiny"])
def test_other_losses_are_evaluated_on_whole_rows(name: str) -> None:
    engine = sedd_graph.build(f"blueprints/{name}.yaml", ["params.depth=1"], device="cpu", compile="off")
    assert engine.process.tail(engine.model) is None


def test_bounds_are_those_of_whole_rows(whole: Callable[[], Any]) -> None:
    for name in ("mdlm-tiny", "sedd-uniform-tiny"):
        engine = sedd_graph.build(f"blueprints/{name}.yaml", ["params.depth=1"], device="cpu", compile="off")
        spread(engine)
        tokens = torch.randint(0, 100, (9, 32), generator=torch.Generator().manual_seed(0))
        found = engine.bound_rows(tokens, seed=1, draws=2)
        with whole():
            expected = engine.bound_rows(tokens, seed=1, draws=2)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


def test_rows_without_read_positions(whole: Callable[[], Any], tmp_path: Path) -> None:
    engine = network(tmp_path, "nelbo", d=8, v=30)
    draw, batch, _ = rows(engine, 3, 20)
    for loss in (torch.zeros_like(batch.loss), batch.loss & torch.tensor([[True], [False], [True]])):
        same(engine, (draw, Batch(batch.tokens, batch.attend, batch.corrupt, loss), None), whole, None)


@pytest.mark.parametrize(("case", "share"), [("nelbo", 0.5), ("uniform", 1.0)])
def test_the_head_sees_the_positions_that_are_read(case: str, share: float, tmp_path: Path) -> None:
    engine = network(tmp_path, case, d=8, v=30)
    seen: list[int] = []
    head: Any = engine.model.root._modules["head"]
    head.register_forward_hook(lambda m, i, o: seen.append(i[0][..., 0].numel()))
    drawn = rows(engine, 16, 256, masked=False)
    engine.trained(*drawn)[0].sum().backward()
    assert sum(seen) == pytest.approx(share * 16 * 256, rel=0.25)
    process: Any = engine.process
    assert sum(seen) >= process.objective.read_positions(*drawn[:2], process.kernel).sum()


@pytest.mark.parametrize("case", CASES)
def test_memory_is_that_of_a_chunk(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of the size of the vocabulary has 8 MB; head, loss and their backward take little more than 2 MB."""
    monkeypatch.setattr(tails, "WORKING", 2**21)
    engine = network(tmp_path, case, d=8, v=2001)
    drawn = rows(engine, 4, 256)
    with (peak := PeakMemory(engine.model.parameters())):
        engine.trained(*drawn)[0].sum().backward()
    weights = sum(4 * p.numel() for p in engine.model.parameters())
    assert peak.peak - weights < 1.3 * 2**21


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_memory_at_full_size(case: str, tmp_path: Path) -> None:
    """A tensor of the size of the vocabulary has 0.82 GB; at most 0.5 GB are used beside weights and their gradients."""
    engine = network(tmp_path, case, d=768, v=50_258)
    drawn = rows(engine, 4, 1024, masked=False)
    head = sum(4 * p.numel() for name, p in engine.model.named_parameters() if name.startswith("head."))
    with (peak := PeakMemory(engine.model.parameters())):
        engine.trained(*drawn)[0].sum().backward()
    assert peak.peak - head <= 0.5e9


class Reads(TorchDispatchMode):
    """Records the operations that wait for a device: those whose result, or its shape, is a number of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique2", "_unique2", "is_nonzero", "equal"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_one_number_is_read_which_a_device_sends_while_the_trunk_runs(case: str, tmp_path: Path) -> None:
    engine = network(tmp_path, case, d=8, v=30)
    drawn = rows(engine, 4, 64)
    engine.trained(*drawn)
    with (reads := Reads()):
        engine.trained(*drawn)[0].sum().backward()
    assert reads.seen == ["_local_scalar_dense"]


def test_saved_activations_are_whole(tmp_path: Path, whole: Callable[[], Any]) -> None:
    engine = network(tmp_path, "nelbo", d=8, v=30, save=", save: {ports: [out], every: 1}")
    tail = engine.process.tail(engine.model)
    assert tail is not None
    assert [name for name, _ in tail.split.steps] == ["modulate", "head"]
    drawn = rows(engine, 4, 64)
    saved = engine.trained(*drawn)[1]
    with whole():
        expected = engine.trained(*drawn)[1]
    assert list(saved) == list(expected) == ["norm.out"]
    for name, value in saved.items():
        assert torch.equal(value, expected[name])
    same(engine, drawn, whole, None)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "whole"])
def test_compiled_code_gives_the_same_numbers(mode: str, tmp_path: Path, whole: Callable[[], Any]) -> None:
    engine = network(tmp_path, "nelbo", d=8, v=1200)
    drawn = rows(engine, 4, 64)
    expected, true = gradients(engine, drawn, None)
    true = {name: value.clone() for name, value in true.items()}
    engine.compile(mode)  # type: ignore[arg-type]
    loss, found = gradients(engine, drawn, None)
    torch.testing.assert_close(loss, expected, rtol=3e-6, atol=0.0)
    for name, value in true.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def members(groups: Groups) -> Iterator[tuple[int, int]]:
    for row, places, valid in zip(groups.row.tolist(), groups.place.tolist(), groups.valid.tolist(), strict=True):
        for place, counts in zip(places, valid, strict=True):
            if counts:
                yield row, place


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("size", [None, 1, 3, 8])
def test_groups_have_every_position_once(blocks: int, size: int | None) -> None:
    read = torch.rand(5, 24, generator=torch.Generator().manual_seed(0)) < 0.4
    read[2] = False
    groups, used = group(read, blocks, size)
    assert sorted(members(groups)) == [tuple(p) for p in read.nonzero().tolist()]
    part, rest = groups.part(0, int(used)), groups.part(int(used), 1000)
    assert part.valid.any(1).all()
    assert not rest.valid.any()
    assert len(rest.row) == 1000
    assert (part.place // (24 // blocks) + part.row[:, None] * blocks == part.unit[:, None]).all()
    padding = ~part.valid
    assert (part.place[padding] == part.place[:, :1].expand_as(padding)[padding]).all()
    assert [group_size(w) for w in (4, 32, 128, 1024, 4096)] == [1, 1, 4, 16, 16]


def test_the_estimate_of_memory_knows_of_it() -> None:
    report = check("mdlm-small", ["params.depth=1"])
    estimates = [
        measure(report.graph, report.registry, batch=4, length=1024, tail=tail).saved_bytes for tail in (False, True)
    ]
    one = 4 * 4 * 1024 * 50_258
    assert estimates[0] > 1.2 * one
    # beside a chunk: the last activations, for the unlikely case that rows have other factors, and their gradient
    assert 2**28 < estimates[1] < estimates[0] - one + 2**28 + 2 * (4 * 4 * 1024 * 768)
