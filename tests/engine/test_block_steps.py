"""Steps of our samplers in SGLang's shape: the tokens are those of our own sampling, in any batch and order."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import sedd_graph
from sedd_graph.engine.block_cache import uncached
from sedd_graph.engine.block_steps import BlockState, BlockSteps
from sedd_graph.engine.engine import Engine
from sedd_graph.errors import UserError
from tests.conftest import ROOT

V, BLOCK, LENGTH = 11, 4, 12
MASK = V
SEEDS = torch.tensor([7, -3, 2**40])
SAMPLERS: list[dict[str, Any]] = [
    {"op": "first_hitting"},
    {"op": "confidence", "steps": 3},
    {"op": "confidence", "steps": 4, "by": "entropy", "block": 2, "temperature": 0.7, "top_p": 0.9},
    {"op": "confidence", "steps": 2, "by": "random"},
    {"op": "ancestral", "steps": 5},
    {"op": "ancestral", "steps": 3, "positions": "systematic"},
    {"op": "entropy_bound", "gamma": 3.0},
]


@dataclasses.dataclass
class Batch:
    """What SGLang passes of some requests."""

    input_ids: Tensor
    positions: Tensor
    batch_size: int
    rids: Sequence[str] | None = None
    sampling_info: Any = None


def engine_of(sampler: dict[str, Any]) -> Engine:
    sizes = ["params.dim=16", "params.heads=2", "params.depth=1", "params.cond=8", f"params.tokens={V}", "data=null"]
    keys = ", ".join(f"{key}: {value}" for key, value in sampler.items())
    engine = sedd_graph.build(ROOT / "blueprints" / "bd3lm-tiny.yaml", [*sizes, f"objective.block={BLOCK}", "objective.clip=null", f"sample={{{keys}}}"], device="cpu", compile="off")  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in engine.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    engine.model.eval()
    return engine


@dataclasses.dataclass
class Request:
    """A request of a program that serves: its tokens, and the state of the block that is being drawn."""

    row: Tensor
    seed: int
    start: int = 0
    state: BlockState | None = None

    def logits(self, engine: Engine) -> Tensor:
        with torch.no_grad():
            denoise = uncached(engine.model, BLOCK, self.row[None, : self.start])
            found = denoise(self.row[None, self.block], torch.full((1,), 1e-5), torch.zeros(1, dtype=torch.int64))
        return found["log_x0"]

    @property
    def block(self) -> slice:
        return slice(self.start, self.start + BLOCK)


def info(requests: Sequence[Request], **more: Tensor) -> SimpleNamespace:
    return SimpleNamespace(sampling_seed=torch.tensor([r.seed for r in requests]), **more)


def serve(steps: BlockSteps, engine: Engine, waiting: list[Request], *, admit: int, **more: Tensor) -> int:
    """Serve first done, first out, admitting some requests each round; return the number of rounds."""
    running, rounds = list[Request](), 0
    waiting = list(waiting)
    while waiting or running:
        running, waiting = running + waiting[:admit], waiting[admit:]
        ids = torch.cat([r.row[r.block] for r in running])
        positions = torch.cat([torch.arange(r.start, r.start + BLOCK) for r in running])
        batch = Batch(ids, positions, len(running), sampling_info=info(running, **more))
        fresh = steps.init_step_state(batch)
        states = [new if r.state is None else r.state for r, new in zip(running, fresh, strict=True)]
        # noise of the mask's logit must not matter, nor a constant for each position
        logits = torch.cat([r.logits(engine) for r in running]) + torch.randn(len(running), BLOCK, 1)
        logits[..., MASK] = torch.randn(len(running), BLOCK)
        done = steps.step(batch, logits.view(len(ids), -1), states)
        for r, state, new, ready in zip(running, states, ids.view(-1, BLOCK), done, strict=True):
            r.row[r.block], r.state = new, None if ready else state
            r.start += BLOCK * ready
        running, rounds = [r for r in running if r.start < LENGTH], rounds + 1
    return rounds


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_tokens_are_those_of_our_own_sampling(sampler: dict[str, Any]) -> None:
    engine = engine_of(sampler)
    prompt = torch.full((3, LENGTH), -1)
    prompt[1, :6] = torch.tensor([1, 2, 3, 4, 5, 6])
    expected = engine.sample(3, LENGTH, prompt=prompt, seeds=SEEDS)
    steps = BlockSteps(sampler, mask_id=MASK, block_size=BLOCK)
    for admit in (1, 3):
        requests = [Request(torch.where(p < 0, MASK, p), s) for p, s in zip(prompt, SEEDS.tolist(), strict=True)]
        serve(steps, engine, requests, admit=admit)
        assert torch.equal(torch.stack([r.row for r in requests]), expected)


def test_requests_have_their_own_temperature_unless_the_config_holds() -> None:
    engine = engine_of({"op": "first_hitting", "temperature": 0.0})
    expected = engine.sample(3, LENGTH, seeds=SEEDS)
    given = {"temperatures": torch.tensor([[0.0], [0.0], [0.0]]), "top_ps": torch.ones(3)}
    ours = {"temperatures": torch.ones(3, 1), "top_ps": torch.ones(3), "top_ks": torch.ones(3, dtype=torch.int32)}
    rows = {}
    cases: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = [
        ("request", {"op": "first_hitting"}, given),
        ("greedy", {"op": "first_hitting"}, ours),
        ("config", {"op": "first_hitting", "temperature": 0.0}, {**ours, "top_ks": torch.full((3,), 2**30)}),
        ("warm", {"op": "first_hitting"}, {**ours, "top_ks": torch.full((3,), 2**30)}),
    ]
    for name, sampler, more in cases:
        requests = [Request(torch.full((LENGTH,), MASK), s) for s in SEEDS.tolist()]
        serve(BlockSteps(sampler, mask_id=MASK, block_size=BLOCK), engine, requests, admit=3, **more)
        rows[name] = torch.stack([r.row for r in requests])
    assert all(torch.equal(rows[name], expected) for name in ("request", "greedy", "config"))
    assert not torch.equal(rows["warm"], expected)


def test_the_mask_may_be_any_token_and_some_are_forbidden() -> None:
    """Logits of a vocabulary with the mask in its midst: the same tokens, where ids behind the mask are one higher."""
    logits, rows = torch.randn(2, BLOCK, V + 1, generator=torch.Generator().manual_seed(0)), {}
    for mask in (MASK, 4):
        order = [*range(mask), MASK, *range(mask, V)]
        steps = BlockSteps(
            {"op": "confidence", "steps": 2}, mask_id=mask, block_size=BLOCK, forbidden=[0, 1, 9 + (mask < 9)]
        )
        batch = Batch(torch.full((2 * BLOCK,), mask), torch.arange(BLOCK).repeat(2), 2, rids=["a", "b"])
        states = steps.init_step_state(batch)
        done = [False]
        while not all(done):
            done = steps.step(batch, SimpleNamespace(full_logits=logits[..., order]), states)  # type: ignore[arg-type]  # as SGLang passes it
        rows[mask] = batch.input_ids
        assert not set(rows[mask].tolist()) & {0, 1, 9 + (mask < 9), mask}
        assert states[0].number == 2
    assert rows[MASK][:BLOCK].tolist() != rows[MASK][BLOCK:].tolist()  # names give different seeds
    assert torch.equal(torch.where(rows[MASK] >= 4, rows[MASK] + 1, rows[MASK]), rows[4])


def test_a_block_ends_within_the_number_of_steps_that_is_told() -> None:
    for sampler in SAMPLERS:
        steps = BlockSteps(sampler, mask_id=MASK, block_size=BLOCK)
        batch = Batch(torch.full((BLOCK,), MASK), torch.arange(BLOCK), 1, rids=["x"])
        states, rounds, done = steps.init_step_state(batch), 0, [False]
        while not done[0]:
            done, rounds = steps.step(batch, torch.zeros(BLOCK, V + 1), states), rounds + 1
        assert rounds <= steps.max_steps(BLOCK)


def test_the_algorithm_of_the_docs_runs_in_the_loop_of_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a base class as SGLang's, whose synchronous loop is written out here."""

    class DllmAlgorithm:
        def __init__(self, config: SimpleNamespace) -> None:
            self.block_size, self.mask_id = config.block_size, config.mask_id

    base = ModuleType("sglang.srt.dllm.algorithm.base")
    base.__dict__["DllmAlgorithm"] = DllmAlgorithm
    monkeypatch.setitem(sys.modules, base.__name__, base)
    text = (ROOT / "docs" / "how-to" / "sglang.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(code, names)
    sampler = {"op": "first_hitting", "temperature": 0.0}
    config = SimpleNamespace(block_size=BLOCK, mask_id=MASK, algorithm_config={"sampler": sampler})
    algorithm, logits = names["Algorithm"](config), torch.randn(2 * BLOCK, V + 1)
    batch = Batch(torch.full((2 * BLOCK,), MASK), torch.arange(BLOCK).repeat(2), 2, rids=["a", "b"])
    states = algorithm.init_step_state(batch)
    for _ in range(algorithm.max_steps(BLOCK)):
        if all(algorithm.step(batch, logits, states)):
            break
    else:
        pytest.fail("the blocks are not done")
    assert torch.equal(batch.input_ids, logits[:, :MASK].argmax(-1))


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(UserError, match=r"'euler' cannot take its steps one at a time; .*confidence.*can"):
        BlockSteps({"op": "euler"}, mask_id=MASK, block_size=BLOCK)
    with pytest.raises(UserError, match="sampler 'confidence': steps: "):
        BlockSteps({"op": "confidence", "steps": 0}, mask_id=MASK, block_size=BLOCK)
    with pytest.raises(UserError, match="give the name of a sampler as op"):
        BlockSteps({"steps": 3}, mask_id=MASK, block_size=BLOCK)
    with pytest.raises(UserError, match="mask_id must be at least 0"):
        BlockSteps({"op": "confidence"}, mask_id=-1, block_size=BLOCK)
    steps = BlockSteps({"op": "confidence", "steps": 2}, mask_id=MASK, block_size=BLOCK)
    batch = Batch(torch.full((BLOCK,), MASK), torch.arange(BLOCK), 1)
    with pytest.raises(UserError, match=r"neither seeds .* nor names"):
        steps.init_step_state(batch)
    states = [BlockState(1, steps.init_step_state(dataclasses.replace(batch, rids=["x"]))[0].config)]
    with pytest.raises(UserError, match="no place for token 11"):
        steps.step(batch, torch.zeros(BLOCK, V), states)
    with pytest.raises(UserError, match="1 blocks of 4 tokens"):
        steps.step(batch, torch.zeros(BLOCK - 1, V + 1), states)
    with pytest.raises(UserError, match="NaN or infinite"):
        steps.step(batch, torch.full((BLOCK, V + 1), torch.nan), states)
