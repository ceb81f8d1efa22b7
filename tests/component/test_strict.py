"""Booleans where numbers are meant: refused at their own place, wherever they stand; and taken where they are meant."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest

from sedd_graph.component.strict import Strict
from sedd_graph.errors import BlueprintError
from sedd_graph.runs.check import check


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('repeat: "${params.depth}"', "repeat: true", "20:25: nodes.trunk.repeat: must be an integer or a string, not True"),
        ("steps: 6", "steps: true", "26:9: train.steps: must be an integer, not True"),
        ("warmup: 2", "warmup: false", "26:29: train.warmup: must be an integer, not False"),
        ("steps: 6", "optimizer: {op: adamw, lr: true}", "26:32: train.optimizer.lr: must be a number, not True"),
        (
            "steps: 6",
            "optimizer: {op: adamw, betas: [0.9, true]}",
            "26:45: train.optimizer.betas[1]: must be a number, not True",
        ),
        ("length: 32", "length: true", "25:48: data.length: must be an integer, not True"),
        ("{hidden: 2*d}", "{hidden: true}", "16:52: blocks.layer.nodes.mlp.with.hidden: must be an integer, not True"),
        ('d: "${params.dim}"', "d: true", "4:29: axes.d: must be an integer or a string, not True"),
        ("steps: 8}", "steps: true}", "24:25: sample.steps: must be an integer, not True"),
        ("{op: loglinear}", "{op: loglinear, eps: true}", "22:49: process.schedule.eps: must be a number, not True"),
        ("blueprint: 1", "blueprint: true", "1:1: blueprint: True: must be 1"),
        ("checkpoint: {every: 3}", "checkpoint: {every: 3}}\nstore: {queue: true", "27:9: store.queue: must be an integer, not True"),
    ],
)  # fmt: skip
def test_true_is_no_number(small: Callable[..., Path], old: str, new: str, said: str) -> None:
    path = small((old, new))
    with pytest.raises(BlueprintError) as error:
        check(path)
    assert str(error.value).replace(f"{path}:", "").split("\n")[0] == said


class Mixed(Strict):
    number: float = 0
    either: bool | int = 0
    flag: bool = False
    anything: Any = None
    choice: Literal[True, 2] = 2
    by_name: dict[str, int | str] = {}


def test_booleans_stay_where_they_are_meant() -> None:
    values = {"either": True, "flag": True, "anything": [True], "choice": True}
    assert Mixed.model_validate(values).model_dump(exclude_unset=True) == values
    for bad in ({"number": True}, {"by_name": {"a": True}}):
        with pytest.raises(pydantic.ValidationError):
            Mixed.model_validate(bad)
