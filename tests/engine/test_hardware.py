"""Devices and dtypes by name."""

import pytest
import torch

from sedd_graph.engine.hardware import pick_device, pick_dtype
from sedd_graph.errors import UserError

CPU = torch.device("cpu")


def test_dtypes_by_name() -> None:
    assert pick_dtype("auto", CPU) is pick_dtype("float32", CPU) is torch.float32
    assert pick_dtype("bfloat16", CPU) is torch.bfloat16
    said = r"unknown dtype 'bfloat_16' \(did you mean 'bfloat16'\?\): use float32, bfloat16 or auto"
    with pytest.raises(UserError, match=said):
        pick_dtype("bfloat_16", CPU)


def test_a_process_of_torchrun_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name in (None, "auto", "cuda"):
        assert pick_device(name) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    names: tuple[str | torch.device | None, ...] = (None, "auto", "cuda", torch.device("cuda"))
    for given in names:
        assert pick_device(given) == torch.device("cuda", 3)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match=r"has 4 CUDA device.s. .LOCAL_RANK=4: start at most as many processes"):
        pick_device("cuda")
    with pytest.raises(UserError, match=r"device 'cuda:4': this machine has 4 CUDA device\(s\)$"):
        pick_device("cuda:4")
