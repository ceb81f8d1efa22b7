"""Estimates of memory against what a CPU really stores, and limits of memory from the files of an operating system."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sedd_graph.engine.measure import _FusedAttention, measure, measure_forward
from sedd_graph.engine.memory import MemoryLimit, memory_limit, resident_bytes
from sedd_graph.engine.peak import PeakMemory
from sedd_graph.engine.samples import SampleRequest
from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["learn", "sedd-tiny"])
def test_what_autograd_saves_is_what_was_estimated(name: str) -> None:
    """Without the weights of attention, [b, heads, l, l], which fused kernels do not store: estimates are linear in l."""
    report = check(name, ["params.depth=2"])
    engine = make_engine(report, device=CPU, compile="off")
    own = {p.untyped_storage()._cdata for p in engine.model.parameters()}
    estimates = [measure(report.graph, report.registry, batch=2, length=n).saved_bytes for n in (64, 256, 4096)]
    assert estimates[1] / estimates[0] == pytest.approx(4, rel=0.01)
    assert estimates[2] / estimates[1] == pytest.approx(16, rel=0.01)
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine.loss(engine.process.example(2, 256))
    real = sum(size for key, size in sizes.items() if key not in own)
    assert loss.requires_grad
    assert estimates[1] == pytest.approx(real, rel=0.1)


def test_the_flops_of_fused_attention_are_those_of_its_products() -> None:
    q = torch.empty(2, 3, 50, 8, device="meta", requires_grad=True)
    for mask in (None, torch.empty(2, 1, 1, 50, dtype=torch.bool, device="meta")):
        counter = FlopCounterMode(display=False)
        with _FusedAttention(), counter:
            out = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        assert out.shape == q.shape
        assert counter.get_total_flops() == 2 * 2 * (2 * 3 * 50 * 50 * 8)


@pytest.mark.parametrize("name", ["sedd-tiny", "d3pm-tiny"])
def test_the_peak_of_a_forward_pass_is_that_of_sampling(name: str) -> None:
    report = check(name, ["params.depth=1"])
    engine = make_engine(report, device=CPU, compile="off")
    cost = measure_forward(report.graph, report.registry, batch=4, length=64)
    peak = PeakMemory([*engine.model.parameters(), *engine.model.buffers()])
    with peak:
        engine.generate(SampleRequest(batch=4, length=64, steps=2, seed=0))
    assert cost.peak_bytes + cost.output_bytes == pytest.approx(peak.peak, rel=0.25)


def system(folder: Path, **files: str) -> Path:
    for name, text in {"proc/meminfo": "MemTotal:       8388608 kB\nMemFree: 1 kB\n", **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


GIB = 2**30
LIMITS = [
    ({}, 8 * GIB, "memory of this machine"),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, 8 * GIB, "memory of this machine"),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": f"{GIB}\n"}, GIB, "cgroup"),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/memory.max": f"{2 * GIB}\n"}, 2 * GIB, "cgroup"),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"}, GIB, "cgroup"),
    ({"proc/self/cgroup": "3:cpu:/x\n2:memory:/y\n", "sys/fs/cgroup/memory/y/memory.limit_in_bytes": f"{3 * GIB}\n"}, 3 * GIB, "cgroup"),
    # in a container the path is often that on the host, and the limit at the root of what is mounted
    ({"proc/self/cgroup": "2:memory:/docker/0\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n"}, GIB, "cgroup"),
    ({"proc/self/cgroup": "2:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8 * GIB, "memory of this machine"),
    ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": f"{99 * GIB}\n"}, 8 * GIB, "memory of this machine"),
    ({"proc/self/cgroup": "odd\n0::\n"}, 8 * GIB, "memory of this machine"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "size", "what"), LIMITS)
def test_the_smallest_limit_counts(tmp_path: Path, files: dict[str, str], size: int, what: str) -> None:
    found = memory_limit(CPU, root=system(tmp_path, **files))
    assert isinstance(found, MemoryLimit)
    assert found.size == size
    assert what in found.what


def test_this_process_has_a_size_and_a_limit() -> None:
    limit = memory_limit(CPU)
    assert limit is not None
    assert 10 * 2**20 < resident_bytes(CPU) < limit.size
