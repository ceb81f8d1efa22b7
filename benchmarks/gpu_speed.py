"""Items of benchmarks/gpu.py that measure speed and memory: the device, training, memory modes, sampling, characters."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from gpu_common import Found, Setting, made, random_data, spread, trainer, training_flops
from handwritten import Loss, Sedd
from handwritten import Trainer as ByHand

from sedd_graph.engine.hardware import pick_dtype
from sedd_graph.engine.network import CompileMode
from sedd_graph.engine.running import RunningModule
from sedd_graph.evaluation.bound import evaluate

ENOUGH_S = 8.0
"""A further case is only begun with so many seconds left."""


def device(setting: Setting) -> Found:
    """1. Matrix products in bfloat16, TF32 and float32, and copies."""
    size = setting.pick(8192, 64)
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        a, b = (torch.randn(size, size, device=setting.device).to(dtype) for _ in range(2))
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            seconds = setting.seconds(lambda a=a, b=b: a @ b, warm=3, repeat=10)  # type: ignore[misc]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        setting.rates[name] = 2 * size**3 / seconds
        yield f"matmul, {name}", {"size": size, "tflops": setting.rates[name] / 1e12}
    x = torch.empty(setting.pick(2**30, 2**16), dtype=torch.uint8, device=setting.device)
    y = torch.empty_like(x)
    yield (
        "copy",
        {"terabytes_per_second": 2 * x.numel() / setting.seconds(lambda: y.copy_(x), warm=3, repeat=20) / 1e12},
    )


def _measured(setting: Setting, step: Callable[[], object], tokens: int, flops: float) -> dict[str, Any]:
    """Return tokens per second, memory and shares of the device's rate for a training step, and the time of the first."""
    first = setting.seconds(step, warm=0, repeat=1)
    seconds: list[float] = []
    peak = setting.peak(lambda: seconds.append(setting.seconds(step)))
    return {
        "tokens_per_second": tokens / seconds[0],
        "seconds": seconds[0],
        "first_step_s": first,
        "peak_gib": peak,
        **setting.speed(flops, seconds[0]),
    }


def _free(setting: Setting) -> None:
    gc.collect()
    if setting.device.type == "cuda":
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def _guarded(name: str, work: Callable[[], dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Return the result of one case; an error of it, such as too little memory, ends that case alone."""
    try:
        return name, work()
    except (RuntimeError, torch.OutOfMemoryError) as error:
        return name, {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def _ours(
    setting: Setting, blueprint: str, batch: int, mode: CompileMode, *changes: str, **sizes: Any
) -> dict[str, Any]:
    engine, report = made(setting, blueprint, *changes, batch=batch, mode=mode, **sizes)
    _, step = trainer(engine, report)
    found = _measured(setting, step, batch * report.data.length, training_flops(report, batch))
    drifts = [m.drift for m in engine.model.modules() if isinstance(m, RunningModule)]
    known = [drift for drift in drifts if drift is not None]
    return found | ({"drift": max(known)} if known else {})


def _by_hand(setting: Setting, batch: int) -> dict[str, Any]:
    _, report = made(setting, "sedd-small", batch=batch, device=torch.device("cpu")) if setting.toy else (None, None)
    states, length = (25, 16) if setting.toy else (50258, 1024)
    size = (
        {"dim": 16, "heads": 2, "depth": 1, "cond": 8}
        if setting.toy
        else {"dim": 768, "heads": 12, "depth": 12, "cond": 128}
    )
    torch.manual_seed(0)
    loss = Loss(Sedd(states=states, dropout=0.1, length=length, tuned=True, **size), states).to(setting.device)
    if not setting.toy:
        loss.compile(fullgraph=True, dynamic=False)
    dtype = pick_dtype("auto", setting.device)
    by_hand = ByHand(loss, lr=3e-4, ema=0.9999, clip=1.0, dtype=dtype, tuned=True)
    tokens = torch.randint(0, states - 1, (batch, length), device=setting.device)
    flops = training_flops(report, batch) if report is not None else 854e6 * batch * length
    return _measured(setting, lambda: by_hand.step(tokens), batch * length, flops)


def training(setting: Setting) -> Found:
    """4. sedd-small: tokens per second and memory by rows and compile mode, beside the same model written by hand."""
    cases: list[tuple[int, str]] = [(32, "block"), (32, "by hand"), (64, "block"), (64, "by hand"), (16, "block")]
    cases += [(8, "block"), (8, "whole"), (64, "whole"), (16, "by hand"), (8, "by hand")]
    for batch, who in setting.pick(cases, [(2, "block"), (2, "by hand")]):
        if setting.left() < ENOUGH_S:
            yield f"{who}, {batch} rows", {"not measured": "no time was left"}
            continue
        if who == "by hand":
            yield _guarded(f"by hand, {batch} rows", lambda b=batch: _by_hand(setting, b))  # type: ignore[misc]
        else:
            yield _guarded(
                f"{who}, {batch} rows",
                lambda b=batch, w=who: _ours(setting, "sedd-small", b, w),  # type: ignore[misc]
            )
        _free(setting)


def memory_modes(setting: Setting) -> Found:
    """5. The reversible model: stored, checkpointed and reconstructed activations."""
    from torch._dynamo.utils import counters

    for memory in ("store", "checkpoint", "reversible"):
        if setting.left() < ENOUGH_S:
            yield memory, {"not measured": "no time was left"}
            continue
        before = counters["stats"]["unique_graphs"]
        name, found = _guarded(
            memory,
            lambda m=memory: _ours(  # type: ignore[misc]
                setting, "sedd-reversible-small", setting.pick(32, 2), "block", f"nodes.trunk.memory={m}"
            ),
        )
        yield name, {**found, "graphs_compiled": counters["stats"]["unique_graphs"] - before}
        _free(setting)


def sampling(setting: Setting) -> Found:
    """7. Sampling and evaluation in float32 and bfloat16 at 16 rows, eager and compiled."""
    rows = setting.pick(16, 2)
    cases = [
        ("analytic", "sedd-small", "{op: analytic, steps: STEPS}", 64),
        ("ancestral", "mdlm-small", "{op: ancestral, steps: STEPS}", 64),
        ("ancestral", "mdlm-small", "{op: ancestral, steps: STEPS}", 1024),
        ("first_hitting", "mdlm-small", "{op: first_hitting}", 1024),
    ]
    for sampler, blueprint, declared, steps in setting.pick(cases, cases[:2]):
        steps = setting.pick(steps, 4)
        engine, report = made(setting, blueprint, f"sample={declared.replace('STEPS', str(steps))}")
        spread(engine)
        engine.model.eval()
        length = report.data.length
        for dtype, mode in ((torch.bfloat16, "block"), (torch.bfloat16, "off"), (torch.float32, "off")):
            if setting.left() < ENOUGH_S or (setting.toy and (mode == "block" or dtype is torch.bfloat16)):
                continue
            engine.network.dtype = dtype
            engine.compile(mode, everywhere=True)  # type: ignore[arg-type]
            engine.sample(rows, length, seed=0)  # compiles
            seconds: list[float] = []

            def draw(engine: Any = engine, length: int = length, seconds: list[float] = seconds) -> None:
                seconds.append(setting.seconds(lambda: engine.sample(rows, length, seed=1), warm=0, repeat=1))

            peak = setting.peak(draw)
            evaluations = engine.process.sampler.evaluations / rows  # type: ignore[attr-defined]
            yield (
                f"{sampler}, {steps} levels, {str(dtype).removeprefix('torch.')}, compile={mode}",
                {
                    "tokens_per_second": rows * length / seconds[0],
                    "ms_per_evaluation": 1e3 * seconds[0] / max(1, evaluations),
                    "evaluations_of_a_row": evaluations,
                    "peak_gib": peak,
                },
            )
        del engine
        _free(setting)
    yield _guarded("evaluation of the bound", lambda: _evaluation(setting))


def _evaluation(setting: Setting) -> dict[str, Any]:
    engine, report = made(setting, "mdlm-small")
    spread(engine)
    engine.network.dtype = pick_dtype("auto", setting.device)
    data, rows, found = random_data(report, rows=64), setting.pick(16, 2), []

    def bound() -> None:
        found.append(evaluate(engine, data, rows=4 * rows, batches=None, draws=1, seed=0, at_once=rows))

    seconds = setting.seconds(bound, warm=1, repeat=1)
    tokens = data.heldout.count * report.data.length
    return {
        "tokens_per_second": tokens / seconds,
        "rows_at_a_time": rows,
        "peak_gib": setting.peak(bound),
        "result": str(found[0]),
    }


def characters(setting: Setting) -> Found:
    """11. A model of 27 letters of the published size for text8."""
    for batch, mode in setting.pick([(256, "block"), (128, "block"), (512, "block")], [(2, "block")]):
        if setting.left() < ENOUGH_S:
            yield f"{batch} rows", {"not measured": "no time was left"}
            continue
        yield _guarded(
            f"mdlm, 27 letters, {batch} rows",
            lambda b=batch, m=mode: _ours(setting, "mdlm-small", b, m, length=256, tokens=27),  # type: ignore[misc]
        )
        _free(setting)
