"""Items of benchmarks/gpu.py about attention and launches: masks, blocks of positions that are hidden, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from gpu_common import Found, Setting, made, trainer, training_flops
from sedd_graph_registry.network import _masked
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sedd_graph.diffusion import visibility
from sedd_graph.diffusion.tokens import block_diffusion
from sedd_graph.diffusion.tokens.block_diffusion import block_inputs
from sedd_graph.engine.compiling import inductor

ENOUGH_S = 5.0
"""A further case is only begun with so many seconds left."""


def _passes(attend: Callable[..., Tensor], qkv: list[Tensor]) -> list[Tensor]:
    """Return the result of attention and its gradients."""
    out = attend(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, torch.ones_like(out))]


def attention(setting: Setting) -> Found:
    """12. Attention of 2 x 1,024 positions: no mask, a mask that hides nothing, that of block diffusion, and its blocks."""
    rows, length, heads = setting.pick((16, 1024, 12), (1, 16, 2))
    tokens = torch.zeros(1, length, dtype=torch.int64, device=setting.device)
    sees = block_inputs(tokens, tokens, block=16)["sees"]
    dtype = torch.float32 if setting.toy else torch.bfloat16
    generator = torch.Generator(setting.device).manual_seed(0)
    shape = (rows, heads, 2 * length, 64)
    exact = [torch.randn(shape, device=setting.device, generator=generator, requires_grad=True) for _ in range(3)]
    qkv = [x.detach().to(dtype).requires_grad_() for x in exact]
    compiled: Any = torch.compile(_masked.masked_attention, backend=inductor, fullgraph=True, dynamic=False)
    flex: Any = _masked.masked_attention if setting.toy else compiled
    every = torch.ones_like(sees)
    cases: list[tuple[str, Callable[..., Tensor], Tensor]] = [
        ("no mask", scaled_dot_product_attention, every),
        ("a mask that hides nothing", lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=every), every),
        ("block diffusion, dense mask", lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=sees), sees),
        ("block diffusion, FlexAttention", lambda q, k, v: flex(q, k, v, None, sees), sees),
    ]
    few = [x[:1].detach().requires_grad_() for x in exact]
    for name, attend, mask in cases:
        found = _passes(attend, qkv)
        true = _passes(partial(scaled_dot_product_attention, attn_mask=mask), few)
        apart = [float((a[:1].float() - b).norm() / b.norm()) for a, b in zip(found, true, strict=True)]
        del found, true
        seconds = setting.seconds(partial(_passes, attend, qkv), warm=2, repeat=10)
        yield name, {"forward_and_backward_ms": 1e3 * seconds, "apart_from_float32": max(apart)}
    blocks = getattr(sees, visibility._NAME, None)
    yield "blocks of positions", {"hidden_percent": None if blocks is None else blocks.sparsity()}


def block_step(setting: Setting) -> Found:
    """13. A training step of block diffusion at depth 4: a dense mask, and FlexAttention."""
    from torch._dynamo.utils import counters

    batch = setting.pick(16, 2)
    losses: dict[str, list[float]] = {}
    for name, devices in (("FlexAttention", visibility.DEVICES), ("dense mask", ())):
        if setting.left() < ENOUGH_S:
            yield name, {"not measured": "no time was left"}
            continue
        block_diffusion._kept_layout.cache_clear()
        torch._dynamo.reset()
        before = counters["stats"]["unique_graphs"]
        with mock.patch.object(visibility, "DEVICES", devices):
            engine, report = made(setting, "bd3lm-small", batch=batch, mode="block", depth=4)
            _, step = trainer(engine, report)
            losses[name] = [step().item() for _ in range(3)]
            seconds = setting.seconds(step, warm=0, repeat=5)
            peak = setting.peak(step)
        yield (
            name,
            {
                "seconds": seconds,
                "peak_gib": peak,
                "losses": losses[name],
                "graphs_compiled": counters["stats"]["unique_graphs"] - before,
                **setting.speed(training_flops(report, batch), seconds),
            },
        )
        del engine, step
    if len(losses) == 2:
        one, two = losses.values()
        yield "losses", {"apart": max(abs(a - b) / abs(b) for a, b in zip(one, two, strict=True))}


def launches(setting: Setting) -> Found:
    """14. sedd-small at depth 2 with few rows: one graph, and one graph whose kernels are recorded (CUDA graphs)."""
    batch = setting.pick(2, 2)
    losses: dict[str, list[float]] = {}
    for mode in setting.pick(("whole", "cuda_graphs"), ("off",)):
        if setting.left() < ENOUGH_S:
            yield mode, {"not measured": "no time was left"}
            continue
        torch._dynamo.reset()
        engine, report = made(setting, "sedd-small", batch=batch, mode=mode, depth=2, length=256)
        _, step = trainer(engine, report)
        losses[mode] = [step().item() for _ in range(5)]
        seconds = setting.seconds(step, warm=1, repeat=20)
        yield mode, {"seconds": seconds, "losses": losses[mode], "peak_gib": setting.peak(step)}
        del engine, step
    if len(losses) == 2:
        one, two = losses.values()
        yield "losses of both", {"apart": max(abs(a - b) / abs(b) for a, b in zip(one, two, strict=True))}
