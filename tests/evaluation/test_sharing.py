"""An evaluation has one result, however its rows are divided: over micro-batches, padding and processes."""

import dataclasses
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import sedd_graph
from sedd_graph.cli import main as cli
from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.diffusion.batch import Randomness, part_of
from sedd_graph.engine import tail as tails
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.fixed_point import log_det
from sedd_graph.engine.network import Network
from sedd_graph.engine.peak import PeakMemory
from sedd_graph.evaluation import bound as bounds
from sedd_graph.evaluation.bound import Evaluation, Result, evaluate, numbers
from sedd_graph.evaluation.sharing import ALONE, shares
from sedd_graph.runs.check import check
from sedd_graph.runs.evaluate import compile_evaluation
from sedd_graph.runs.open import read_data
from sedd_graph.training.config import TrainConfig
from tests.conftest import SMALL
from tests.engine.test_tail import Reads, network
from tests.runs.forked import Forked

ROWS, BATCHES, DRAWS = 7, 2, 2
SETTINGS: dict[str, Any] = {"rows": ROWS, "batches": BATCHES, "draws": DRAWS, "seed": 3}
ONE = ["params.depth=1", "data.length=32"]
FAMILIES = {
    # name: overrides. Tokens, with and without a tail, a reconstruction term, blocks; strings; vectors; a flow
    "mdlm-tiny": ONE,
    "sedd-uniform-tiny": ONE,
    "genmd4-tiny": ONE,
    "bd3lm-tiny": ONE,
    "indel-tiny": ONE,
    "diffusion-lm-tiny": ONE,
    "flow-tiny": [],
}


def opened(name: str) -> tuple[Engine, Dataset | PointData]:
    path = Path("blueprints") / f"{name}.yaml"
    engine = sedd_graph.build(path, FAMILIES.get(name, ONE), device="cpu", compile="off")
    for p in engine.model.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(p.numel()))
    return engine, read_data(check(path, FAMILIES.get(name, ONE)), root=path.parent)


class Recorded:
    """One of several processes that run after each other: what it would send to the others is recorded."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.sent = rank, size, list[Tensor]()

    def sum_(self, value: Tensor) -> None:
        self.sent.append(value.clone())


class Last(Recorded):
    """The process that runs last, and receives what the others have sent."""

    def __init__(self, others: list[Recorded]) -> None:
        super().__init__(len(others), len(others) + 1)
        self.others = others

    def sum_(self, value: Tensor) -> None:
        for other in self.others:
            value += other.sent[len(self.sent)]
        self.sent.append(value)


def shared(engine: Engine, data: Any, processes: int, at_once: int) -> Result:
    others = [Recorded(rank, processes) for rank in range(processes - 1)]
    for other in others:
        evaluate(engine, data, **SETTINGS, at_once=at_once, workers=other)
    return evaluate(engine, data, **SETTINGS, at_once=at_once, workers=Last(others))


def near(found: Result, expected: Result) -> None:
    """Assert that two results are equal up to rounding: numbers to 1e-6, and counts exactly."""
    if isinstance(found, Evaluation) and isinstance(expected, Evaluation):
        assert len(found.levels) == len(expected.levels)
        for a, b in zip(found.levels, expected.levels, strict=True):
            assert (a.draws, a.tokens) == (b.draws, b.tokens)  # the noise levels are the same
            assert dataclasses.astuple(a) == pytest.approx(dataclasses.astuple(b), rel=1e-5, abs=1e-6, nan_ok=True)
    flat = [{k: v for k, v in numbers(r).items() if k != "perplexity"} for r in (found, expected)]
    assert flat[0] == pytest.approx(flat[1], rel=2e-6, abs=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_bounds_do_not_depend_on_micro_batch_and_processes(name: str) -> None:
    engine, data = opened(name)
    expected = evaluate(engine, data, **SETTINGS)
    near(evaluate(engine, data, **SETTINGS, at_once=3), expected)
    whole = shared(engine, data, 3, at_once=3)
    near(whole, expected)
    assert repr(whole) == repr(
        evaluate(engine, data, **SETTINGS, at_once=3)
    )  # to the last bit, since the parts are the same


def test_estimated_log_determinants_do_not_depend_on_the_division() -> None:
    """Of a flow of more than 128 dimensions they are estimated, with random vectors of each row."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 200, generator=generator), torch.randn(200, 200, generator=generator) / 60

    def estimate(part: range) -> Tensor:
        torch.manual_seed(1)
        g = lambda y: 0.5 * torch.tanh(y @ weight)  # noqa: E731
        return log_det(g, part_of(x, part), lipschitz=0.5, part=part, total=len(x)).value

    torch.manual_seed(1)
    whole = log_det(lambda y: 0.5 * torch.tanh(y @ weight), x, lipschitz=0.5).value
    assert torch.equal(estimate(range(7)), whole)
    for part in (range(2), range(2, 5), range(5, 9)):
        torch.testing.assert_close(estimate(part), part_of(whole, part), rtol=1e-5, atol=1e-6)


def test_compiled_shapes_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a batch that is shorter than a micro-batch; padding changes no number."""
    engine, data = opened("sedd-uniform-tiny")
    settings = SETTINGS | {"rows": 8, "batches": None}
    monkeypatch.setattr(data, "held_out_batches", lambda rows, *, batches: [range(8), range(8, 16), range(90, 93)])
    expected = evaluate(engine, data, **settings)
    sizes: set[tuple[str, int]] = set()
    embed: Any = engine.model.root._modules["embed"]
    embed.register_forward_hook(lambda m, i, o: sizes.add(("rows", len(i[0]))))
    monkeypatch.setattr(Network, "compiled_everywhere", True)
    for at_once in (3, 8):
        sizes.clear()
        near(evaluate(engine, data, **settings, at_once=at_once), expected)
        # the bound, and the rows of the reconstruction term, which may be more for the short batch
        assert ("rows", at_once) in sizes
        assert len(sizes) <= 3


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_row_counts_once_and_processes_evaluate_equally_many_parts(size: int) -> None:
    batches = [range(10), range(40, 50), range(90, 93)]
    for at_once in (1, 4, 10):
        seen: list[tuple[int, int]] = []
        parts: list[int] = []
        for rank in range(size):
            mine = shares(batches, at_once, Recorded(rank, size), padded=True)
            parts.append(sum(len(share.parts) for share in mine))
            for share in mine:
                assert all(len(part) == at_once for part in share.parts)
                seen += [(share.number, i) for p, n in zip(share.parts, share.kept, strict=True) for i in p[:n]]
        assert sorted(seen) == [(number, i) for number, rows in enumerate(batches) for i in range(len(rows))]
        assert len(set(parts)) == 1
    assert [len(p) for share in shares(batches, 4, ALONE, padded=False) for p in share.parts] == [4, 4, 2, 4, 4, 2, 3]


def test_numbers_beyond_the_last_row_are_those_of_the_first() -> None:
    def drawn(start: int, rows: int) -> list[Tensor]:
        random = Randomness(torch.Generator().manual_seed(0), start=start, total=6)
        return [
            random.rand(rows, 2),
            random.randn(rows, 3),
            random.rand48(rows),
            random.keys(rows),
            random.low_discrepancy(rows),
            random.systematic(rows, 0.4),
        ]

    for whole, part in zip(drawn(0, 6), drawn(4, 9), strict=True):
        assert torch.equal(part, whole[[4, 5, 0, 1, 2, 3, 4, 5, 0]])


class Transfers(TorchFunctionMode):
    """Counts what waits for a device: results that become numbers of the host."""

    NAMES = ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.NAMES:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["mdlm-tiny", "sedd-uniform-tiny"])
def test_waits_of_an_evaluation_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None beside those of the chunks of the head, which are sent while the trunk runs, and one for the results."""
    engine, data = opened(name)
    sent: list[str] = []
    real = bounds._evaluate_share

    def watched(*arguments: Any, **settings: Any) -> Any:
        with (reads := Reads()), (transfers := Transfers()):
            found = real(*arguments, **settings)
        sent.append(f"{len(reads.seen)} {sorted(set(transfers.seen))}")
        return found

    evaluate(engine, data, **SETTINGS)
    monkeypatch.setattr(bounds, "_evaluate_share", watched)
    evaluate(engine, data, **SETTINGS | {"draws": 1})
    forwards = 2 if name == "sedd-uniform-tiny" else 1  # it has a reconstruction term
    assert sent == [f"{forwards} ['__int__', 'cpu']"] * BATCHES


def test_a_bound_holds_no_tensor_of_the_whole_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 50,258 states and 1,024 positions one has 206 MB, and several would be alive; here a chunk takes 64 MiB."""
    monkeypatch.setattr(tails, "WORKING", 2**26)
    engine = network(tmp_path, "nelbo", d=8, v=50_258)
    tokens = torch.randint(0, 50_257, (1, 1024), generator=torch.Generator().manual_seed(0))
    with (peak := PeakMemory(engine.model.parameters())):
        engine.bound_rows(tokens, seed=0)
    assert 2**20 < peak.peak < 1.3 * 2**26 < 4 * 1024 * 50_258


def test_dtypes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The record names the precision that the network has run in, and it is float32 on a CPU."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    assert cli.run(["build", str(path), "--runs", str(tmp_path), "--path-to", str(tmp_path / "at"), "--proof", "quick", "--device", "cpu"]) == 0  # fmt: skip
    run = Path((tmp_path / "at").read_text())
    used: list[bool] = []
    real = Network.evaluating

    def watched(self: Network, **settings: Any) -> Any:
        context = real(self, **settings)

        class Watched:
            def __enter__(self) -> None:
                context.__enter__()
                used.append(torch.is_autocast_enabled("cpu"))

            def __exit__(self, *error: Any) -> None:
                context.__exit__(*error)

        return Watched()

    monkeypatch.setattr(Network, "evaluating", watched)
    found: dict[str, float] = {}
    for flags in ([], ["--dtype", "bfloat16"]):
        used.clear()
        (run / "evaluation.json").unlink(missing_ok=True)
        assert cli.run(["eval", str(run), "--batches", "1", "--device", "cpu", *flags]) == 0
        record = json.loads((run / "evaluation.json").read_text())
        found[record["protocol"]["dtype"]] = record["nats_per_token"]
        assert used == [bool(flags)]
        assert cli.run(["sample", str(run), "--steps", "2", "--batch", "1", "--device", "cpu", *flags]) == 0
        assert used == [bool(flags)] * 2
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.02)
    tape = ["--tape", str(tmp_path / "tape.zarr")]
    capsys.readouterr()
    assert cli.run(["sample", str(run), "--device", "cpu", *tape, "--dtype", "bfloat16"]) == 2
    assert "a tape is of a network in float32: leave --dtype out" in capsys.readouterr().err


def test_a_flow_is_evaluated_in_float32(small: Callable[..., Path]) -> None:
    from sedd_graph.errors import UserError
    from sedd_graph.runs.open import Run
    from sedd_graph.runs.precision import choose_dtype, dtype_name

    engine, _ = opened("flow-tiny")
    report = check("blueprints/flow-tiny.yaml", [])
    run = Run(Path(), report, engine, None, Path(), "fresh")
    choose_dtype(run, "auto")
    assert dtype_name(run) == "float32"
    with pytest.raises(UserError, match="a process of points is evaluated in float32, not in bfloat16"):
        choose_dtype(run, "bfloat16")


def test_two_processes_share_an_evaluation(tmp_path: Path) -> None:
    """Processes of torchrun, by gloo: the bound during and after training is that of one process."""
    text = SMALL.replace("evaluate: null", "evaluate: {every: 2, batches: 3}").replace("steps: 6, batch: 8", "steps: 3, batch: 8").replace("length: 32", "length: 32, holdout: 0.01")  # fmt: skip
    (tmp_path / "small.yaml").write_text(text)
    assert cli.run(["build", str(tmp_path / "small.yaml"), "--runs", str(tmp_path), "--path-to", str(tmp_path / "at"), "--proof", "quick", "--device", "cpu"]) == 0  # fmt: skip
    runs = [Path((tmp_path / "at").read_text()), tmp_path / "shared"]
    shutil.copytree(runs[0], runs[1])
    assert Forked(["train", str(runs[0]), "--device", "cpu"], tmp_path / "log").wait() == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = ["train", str(runs[1]), "--device", "cpu"]
    ranks = [Forked(command, tmp_path / f"log{rank}", {**own, "RANK": str(rank)}) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.text() for rank in ranks]
    heldout = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "heldout_loss" in line]
        for run in runs
    ]
    assert len(heldout[0]) == 1
    for one, two in zip(*heldout, strict=True):
        assert {k: v for k, v in two.items() if k != "seconds"} == pytest.approx(one, rel=1e-5)
    final = [json.loads((run / "evaluation.json").read_text()) for run in runs]
    assert final[1]["nats_per_token"] == pytest.approx(final[0]["nats_per_token"], rel=1e-5)
    assert final[1]["protocol"]["rows_at_a_time"] == 4
    assert final[0]["protocol"]["rows_at_a_time"] == 8


@pytest.mark.parametrize(
    ("mode", "kind", "draws", "expected"),
    [("auto", "cpu", 100, []), ("auto", "cuda", 1, []), ("auto", "cuda", 100, ["block"]), ("block", "cpu", 1, ["block"]), ("off", "cuda", 100, [])],
)  # fmt: skip
def test_an_evaluation_is_compiled_where_that_repays(mode: Any, kind: str, draws: int, expected: list[str]) -> None:
    chosen: list[str] = []
    engine = SimpleNamespace(
        device=torch.device(kind), compile=lambda how, *, everywhere: chosen.append(how if everywhere else "?")
    )
    run: Any = SimpleNamespace(engine=engine, report=SimpleNamespace(train=TrainConfig(batch=32, accumulate=4)))
    data: Any = SimpleNamespace(held_out_batches=lambda rows, *, batches: [range(rows)] * 3)
    compile_evaluation(run, mode, data, batches=None, draws=draws)  # 12 evaluations of 8 rows for each draw
    assert chosen == expected
