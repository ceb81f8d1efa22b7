"""Items of benchmarks/gpu.py that compare numbers: devices, precisions, compiled code, waits, exact arithmetic, resumption."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_common import CPU, Found, Setting, made, spread, trainer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from sedd_graph.component.counter_rng import dropout
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.engine.engine import Engine
from sedd_graph.families.token_loss import TokenLoss
from sedd_graph.training.config import TrainConfig
from sedd_graph.training.distributed import World

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique2", "_unique2", "is_nonzero", "equal")
"""Operations whose result, or its shape, is a number of the host, so that a device is waited for."""
SAMPLERS = {
    # name: blueprint, sampler. Rows of tokens with scores, and with a prediction of the clean token
    "analytic": ("sedd-small", "{op: analytic, steps: 8}"),
    "euler": ("sedd-small", "{op: euler, steps: 8}"),
    "ancestral": ("mdlm-small", "{op: ancestral, steps: 8}"),
    "first_hitting": ("mdlm-small", "{op: first_hitting}"),
    "remdm": ("mdlm-small", "{op: remdm, steps: 8}"),
    "confidence": ("mdlm-small", "{op: confidence, steps: 8}"),
    "entropy_bound": ("mdlm-small", "{op: entropy_bound}"),
}


def drawn(engine: Engine, rows: int, length: int) -> tuple[Any, Batch, Tensor]:
    """Return a noise draw, its batch and dropout keys."""
    tokens = torch.randint(
        0, engine.process.plan.states - 1, (rows, length), generator=torch.Generator().manual_seed(1)
    )
    batch, random = Batch.of(tokens.to(engine.device)), Randomness(torch.Generator(engine.device).manual_seed(1))
    return engine.draw(batch, random=random), batch, random.keys(rows)


def moved(given: tuple[Any, Batch, Tensor], device: torch.device) -> tuple[Any, Batch, Tensor]:
    """Return a draw, batch and keys on another device."""
    draw, batch, key = given
    return (
        type(draw)(*(getattr(draw, f.name).to(device) for f in dataclasses.fields(draw))),
        batch.to(device),
        key.to(device),
    )


def gradients(
    engine: Engine, given: tuple[Any, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of each row and the gradients of their sum, float32 on the CPU."""
    engine.model.zero_grad(set_to_none=True)
    with torch.autocast(engine.device.type, dtype, enabled=dtype is not torch.float32):
        loss = engine.trained(*given)[0]
    loss.sum().backward()
    return loss.detach().float().cpu(), [p.grad.float().cpu() for p in engine.model.parameters() if p.grad is not None]


def apart(found: tuple[Tensor, list[Tensor]], true: tuple[Tensor, list[Tensor]]) -> dict[str, float]:
    """Return the relative error of the loss and the largest of a gradient, and the cosine of all gradients together."""
    pairs = list(zip(found[1], true[1], strict=True))
    one, two = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    return {
        "loss": float((found[0] - true[0]).norm() / true[0].norm()),
        "gradient": max(float((a - b).norm() / b.norm().clamp(min=1e-20)) for a, b in pairs),
        "cosine": float(torch.nn.functional.cosine_similarity(one.double(), two.double(), dim=0)),
    }


def agreement(setting: Setting) -> Found:
    """2. Loss and gradients at one draw: CPU and device, float32 and bfloat16, eager and compiled; bits of dropout."""
    length = setting.pick(256, 16)
    cpu, _ = made(setting, "sedd-small", depth=2, device=CPU, length=length)
    ours, _ = made(setting, "sedd-small", depth=2, length=length)
    for engine in (cpu, ours):
        spread(engine)
    on_cpu = drawn(cpu, 2, length)
    given = moved(on_cpu, setting.device)
    found = gradients(ours, given)
    yield "device against CPU, float32", apart(found, gradients(cpu, on_cpu))
    yield "bfloat16 against float32", apart(gradients(ours, given, torch.bfloat16), found)
    x, key = torch.ones(3, 5, 7), torch.arange(3, dtype=torch.int32)
    masks = [dropout(x.to(d), 0.3, key.to(d)).cpu() for d in (CPU, setting.device)]
    yield "dropout", {"equal": torch.equal(*masks)}
    if not setting.toy:
        ours.compile("block")
        yield "compiled against eager, float32", apart(gradients(ours, given), found)
        masks.append(torch.compile(dropout)(x.to(setting.device), 0.3, key.to(setting.device)).cpu())
        yield "dropout, compiled", {"equal": torch.equal(masks[0], masks[2])}


class Reads(TorchDispatchMode):
    """Counts the operations for which the host waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def waits(setting: Setting) -> Iterator[Counter[str]]:
    """Count in a context what waits for the device: by the driver's warnings, with the place; on a CPU by operations."""
    found: Counter[str] = Counter()
    if setting.device.type != "cuda":
        with (reads := Reads()):
            yield found
        found.update(reads.seen)
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message))


def syncs(setting: Setting) -> Found:
    """3. How often the host waits for the device in a training step, an evaluation of the bound, and per evaluation of samplers."""
    for name in setting.pick(["sedd-small", "mdlm-small", "sedd-reversible-small"], ["sedd-small"]):
        engine, report = made(setting, name, depth=2, length=256)
        _, step = trainer(engine, report)
        for _ in range(3):
            step()
        with waits(setting) as found:
            step()
        yield f"training step, {name}", {"waits": sum(found.values()), "where": dict(found)}
    for sampler in setting.pick(list(SAMPLERS), ["analytic", "first_hitting"]):
        name, declared = SAMPLERS[sampler]
        engine, report = made(setting, name, f"sample={declared}", depth=2, length=256)
        length = report.data.length
        engine.sample(2, length, seed=0)
        with waits(setting) as found:
            engine.sample(2, length, seed=0)
        many = max(1, engine.process.sampler.evaluations // 2)  # type: ignore[attr-defined]
        yield f"sampler {sampler}", {"waits_per_evaluation": sum(found.values()) / many, "where": dict(found)}


def exact(setting: Setting) -> Found:
    """6. Exact arithmetic: the gradients of reconstructed layers are those of stored ones, to the last bit."""
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for memory in ("store", "reversible"):
            changes = ("nodes.trunk.arithmetic=exact", f"nodes.trunk.memory={memory}")
            engine, _ = made(setting, "sedd-reversible-small", *changes, length=256)
            spread(engine)
            given = drawn(engine, 2, setting.pick(256, 16))
            with sdpa_kernel(SDPBackend.MATH):  # the backward pass of flash attention adds in any order
                found.append(gradients(engine, given, dtype))
        # outside the trunk, gradients are sums over layers in another order
        names = [name for name, p in engine.model.named_parameters() if p.grad is not None]
        pairs = [pair for pair in zip(names, found[0][1], found[1][1], strict=True) if pair[0].startswith("trunk")]
        other = {n: float((a - b).norm() / b.norm().clamp(min=1e-20)) for n, a, b in pairs if not torch.equal(a, b)}
        yield (
            f"exact, {str(dtype).removeprefix('torch.')}",
            {
                "loss_equal": torch.equal(found[0][0], found[1][0]),
                "gradients": len(pairs),
                "equal": len(pairs) - len(other),
                "others_apart": other,
            },
        )


def resume(setting: Setting) -> Found:
    """8. Six steps against three, a checkpoint and three more."""
    losses: dict[str, list[float]] = {}
    for name, legs in (("unbroken", [6]), ("resumed", [3, 6])):
        with tempfile.TemporaryDirectory() as folder:
            losses[name] = []
            for number, end in enumerate(legs):
                engine, report = made(setting, "sedd-small", batch=4, depth=2, length=256)
                found, step = trainer(engine, report, run=Path(folder), steps=6, compile="off")
                (Path(folder) / "checkpoints").mkdir(exist_ok=True)
                if number:
                    found.resume()
                while found.step < end:
                    losses[name].append(step().item())
                if number < len(legs) - 1:
                    found.save()
                    if (writer := getattr(found, "writer", None)) is not None:
                        writer.finish()
    worst = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    first = abs(losses["unbroken"][3] - losses["resumed"][3])
    yield "resumed against unbroken", {"first_loss_apart": first, "largest": worst, **losses}


def parallel(setting: Setting) -> Found:
    """9. Replicas (DDP) and shards (FSDP2), forced with one process: losses and seconds of a step."""
    if "parallel" not in TrainConfig.model_fields:
        yield "parallel", {"not available": "this version has no train.parallel"}
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with mock.patch.dict(os.environ, own | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}):
        world = World.from_environment(setting.device)
    try:
        for name, shard, joined in (
            ("one process", 1, None),
            ("replicas (DDP)", 1, world),
            ("shards (FSDP2)", None, world),
        ):
            engine, report = made(
                setting, "sedd-small", batch=setting.pick(16, 4), mode="block", depth=setting.pick(6, 1)
            )
            kind: Any = type(getattr(report.train, "parallel"))  # noqa: B009
            _, step = trainer(engine, report, world=joined, parallel=kind(shard=shard))
            losses = [step().item() for _ in range(3)]
            yield name, {"losses": losses, "seconds": setting.seconds(step, warm=1)}
            del engine, step
    finally:
        world.close()


def large(setting: Setting) -> Found:
    """10. More than 2^31 logits at once, against chunks of positions."""
    rows, length = setting.pick(48, 3), setting.pick(1024, 16)
    engine, report = made(setting, "mdlm-small", depth=1)
    spread(engine)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, report.plan.states - 1, (rows, length), generator=generator)
    chunks = engine.bound_rows(tokens, seed=1)
    with mock.patch.object(TokenLoss, "tail", return_value=None):
        whole = engine.bound_rows(tokens, seed=1)
    elements = rows * length * report.plan.states
    yield (
        "whole rows against chunks",
        {
            "elements": elements,
            "apart": float(((whole - chunks) / whole).abs().max()),
            "finite": bool(whole.isfinite().all()),
        },
    )
