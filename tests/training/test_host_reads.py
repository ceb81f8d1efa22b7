"""A training step reads no number on the host, which would wait for a GPU, but one that is sent while the trunk runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sedd_graph.engine.host_number import HostNumber
from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine, read_data
from sedd_graph.training.distributed import World
from sedd_graph.training.trainer import Trainer

SMALL = ["params.depth=1", "data.length=32", "train.batch=4", "train.accumulate=1"]
SENT = {
    # name: numbers that are sent to the host in a step, those of the positions that a chunked loss reads
    "mdlm-tiny": 1,
    "sedd-uniform-tiny": 1,
    "bd3lm-tiny": 1,
    "genmd4-tiny": 0,
    "diffusion-lm-tiny": 0,
    "langflow-tiny": 0,
    "flow-tiny": 0,
}


class Operations(TorchDispatchMode):
    """Records operations whose result, or its shape, is a number of the host."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique2", "_unique2", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(x is not None and x.dtype == torch.bool for x in _indices(args))
        if name in self.NAMES or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def _indices(args: Any) -> Any:
    return args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()


class Conversions(TorchFunctionMode):
    """Records methods that make a number or an array of the host from a tensor."""

    NAMES = ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in self.NAMES:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SENT)
def test_a_training_step_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("blueprints") / f"{name}.yaml"
    report = check(path, [] if name == "flow-tiny" else SMALL)
    engine = make_engine(report, device=torch.device("cpu"), compile="off")
    trainer = Trainer(engine, read_data(report, root=path.parent), report.train, Path(), World.single(), print)
    engine.model.train()
    sent: list[int] = []

    def value(self: HostNumber) -> int:  # on a GPU an event of the work before the trunk is awaited
        sent.append(1)
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            return int(self.value)

    monkeypatch.setattr(HostNumber, "__int__", value)

    def step() -> None:
        nats, counted, _ = trainer.train_step()
        trainer.update(0.1)
        trainer.window.add(nats, counted)
        trainer.step += 1

    step()  # what is read once
    sent.clear()
    with (operations := Operations()), (conversions := Conversions()):
        step()
    assert operations.seen == []
    assert conversions.seen == ["cpu"] * SENT[name]  # by which the number is sent
    assert len(sent) == SENT[name]
