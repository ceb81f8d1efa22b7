"""Devices and dtypes by name."""

import pytest
import torch

from sedd_graph.engine.hardware import pick_dtype
from sedd_graph.errors import UserError

CPU = torch.device("cpu")


def test_dtypes_by_name() -> None:
    assert pick_dtype("auto", CPU) is pick_dtype("float32", CPU) is torch.float32
    assert pick_dtype("bfloat16", CPU) is torch.bfloat16
    said = r"unknown dtype 'bfloat_16' \(did you mean 'bfloat16'\?\): use float32, bfloat16 or auto"
    with pytest.raises(UserError, match=said):
        pick_dtype("bfloat_16", CPU)
