"""What needs more memory than there is, is refused before anything is allocated, with settings that do fit."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sedd_graph.engine.memory import MemoryLimit
from sedd_graph.errors import UserError
from sedd_graph.runs import memory
from sedd_graph.runs.check import check
from sedd_graph.runs.memory import measure_training, require_training_memory

CPU = torch.device("cpu")


def limited(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda device: MemoryLimit(int(size), "memory limit"))
    monkeypatch.setattr(memory, "resident_bytes", lambda device: 0)


def refused(path: Path, *overrides: str, ignore: bool = False) -> str:
    report = check(path, overrides)
    said: list[str] = []
    try:
        require_training_memory(measure_training(report), report, CPU, ignore=ignore, say=said.append)
    except UserError as error:
        assert not said
        return str(error)
    return "".join(said)


def test_settings_that_are_advised_do_fit(small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = small(("depth: 2", "depth: 12"))
    cost = measure_training(check(path))
    limited(monkeypatch, cost.state_bytes + cost.saved_bytes)
    assert refused(path) == ""
    for share in (0.9, 0.5, 0.3):
        limited(monkeypatch, cost.state_bytes + share * cost.saved_bytes)
        said = refused(path)
        assert said.startswith("training needs about 0.")
        assert said.endswith("would fit. --ignore-memory goes on all the same")
        settings = re.findall(r"train\.accumulate=\d+|train\.batch=\d+|nodes\.trunk\.memory=checkpoint", said)
        assert len(settings) == 3
        for setting in settings:
            assert refused(path, setting) == "", setting
        # and one row more would not
        (rows,) = re.findall(r"train\.batch=(\d+)", said)
        assert refused(path, f"train.batch={int(rows) + 1}") != ""
    assert refused(path, ignore=True).startswith("warning     training needs about ")


def test_weights_that_do_not_fit_have_no_advice_about_rows(
    small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small()
    cost = measure_training(check(path))
    limited(monkeypatch, cost.state_bytes)
    assert "; take a smaller model (params), or fewer tokens (data.length). " in refused(path)
    with_average, without = (measure_training(check(path, [f"train.ema={e}"])).state_bytes for e in ("0.9", "null"))
    assert with_average * 4 == without * 5
