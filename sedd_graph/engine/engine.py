"""The engine: a network and its noise process on a device, to train, to bound and to sample with.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.conditions.constraint import Matching, Pieces, allowed_tokens, lacks
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.tokens.block_diffusion import block_inputs, hold_prompt, write_blocks
from sedd_graph.diffusion.tokens.guidance import Classifier, classified, renoised, unprompted
from sedd_graph.diffusion.tokens.process import Objective
from sedd_graph.diffusion.tokens.sampler import Denoise
from sedd_graph.diffusion.tokens.schedule_loss import steadied
from sedd_graph.engine.block_cache import cached
from sedd_graph.engine.compiling import compile_in_place
from sedd_graph.engine.construct import build_model
from sedd_graph.engine.positionwise_suffix import PositionwiseSuffix
from sedd_graph.engine.regions import Model, RegionModule
from sedd_graph.engine.weights import save_tensors
from sedd_graph.errors import UserError
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.tokens import Process, make_process
from sedd_graph.graph.model import Graph
from sedd_graph.store.files import disk_faults

__all__ = ["NOISE", "PACE", "Bound", "CompileMode", "Engine", "LossModule", "mean_and_error", "mix_seed"]

CompileMode = Literal["auto", "block", "whole", "off"]
"""What is compiled; see :meth:`Engine.compile`."""


NOISE, PACE = "process:kernel", "process:schedule"
"""The names of a kernel and of a schedule with parameters among the modules of a model; no node can have them."""


class Bound(NamedTuple):
    """An upper bound on -log p in nats per sequence, and the standard error of its mean."""

    mean: float
    standard_error: float


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers (splitmix64), so that neighbouring steps share nothing."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def feed(draw: Draw, batch: Batch, block: int | None) -> dict[str, Tensor]:
    """The graph inputs that the engine knows (see :data:`sedd_graph.families.plan.FED`); ``block`` is the objective's."""
    if block is not None:
        return block_inputs(draw.xt, batch.tokens, block=block)
    return {"tokens": draw.xt, "sigma": draw.sigma, "t": draw.t, "attend": _for_each(draw, batch.attend)}


def _for_each(draw: Draw, rows: Tensor) -> Tensor:
    """``rows`` [b, ...] of a batch, as many times over as the draw has rows for each."""
    copies = len(draw.xt) // len(rows)
    return rows if copies == 1 else torch.cat([rows] * copies)


def mean_and_error(rows: list[Tensor]) -> Bound:
    """Over all of some batches of nats per row."""
    if not rows:
        raise UserError("bound: there are no batches")
    values = torch.cat(rows)
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Bound(values.mean().item(), error)


class LossModule(nn.Module):
    """Network and objective in one: what is compiled, and what DDP wraps."""

    def __init__(self, model: Model, process: Process) -> None:
        super().__init__()
        self.model = model
        self._process = process

    def forward(self, draw: Draw, batch: Batch, key: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Nats per sequence [b], and the saved ports. ``key`` int32 [b] turns dropout on."""
        block = self._process.objective.block
        outputs, taps = self.model.run(feed(draw, batch, block), None if key is None else _for_each(draw, key))
        with full_precision(draw.xt):
            loss = self._process.objective.loss(outputs, draw, batch, self._process.kernel, self._process.schedule)
            if self._process.schedule.learned:
                # in the units of the loss: nats per sequence, times the share of a guess's that each token costs
                guess = batch.counted.clamp(min=1) * math.log(self._process.kernel.states)
                loss = loss + steadied(loss, draw.t, self._process.schedule) / guess
        return loss, taps


class Engine:
    """A compiled training and sampling engine. Make one with :func:`sedd_graph.build`.

    ``allowed`` bool [n] marks the tokens that may be generated; the mask is never one of them. ``pieces`` gives the bytes
    that each token stands for (None: no text), where there is a tokenizer.
    """

    def __init__(
        self,
        graph: Graph,
        registry: Registry,
        plan: ProcessPlan | None,
        *,
        device: torch.device,
        compile: CompileMode = "auto",
        forbidden: Iterable[int] = (),
        pieces: Pieces | None = None,
        on_save: Callable[[Path], None] | None = None,
        seed: int = 0,
    ) -> None:
        self.graph, self.device = graph, device
        torch.manual_seed(seed)
        self.model = build_model(graph, registry).to(device)
        self.process: Process | None = None
        self.loss_module: LossModule | None = None
        self.allowed: Tensor | None = None
        self._on_save, self._pieces = on_save, pieces
        if plan is not None:
            self.process = make_process(plan, registry)
            for part in self.process:
                if part is not None:
                    part.to(device)
            for name, part in ((NOISE, self.process.kernel), (PACE, self.process.schedule)):
                if part.learned:
                    # with the network's: optimized, averaged, checkpointed and saved
                    self.model.add_module(name, part)
            self.loss_module = LossModule(self.model, self.process)
            kernel = self.process.kernel
            allowed = torch.ones(kernel.states, dtype=torch.bool)
            allowed[[i for i in forbidden if i < kernel.states]] = False
            if kernel.mask is not None:
                allowed[kernel.mask] = False
            self.allowed = allowed.to(device)
        self.compile_mode: CompileMode = "off"
        self.compile(compile)

    def compile(self, mode: CompileMode, *, everywhere: bool | None = None) -> None:
        """``block``: each repeated block in place, one compilation for all repeats; ``whole``: network and loss as one
        graph (where no block has a backward pass of its own), which takes several times as long to compile and then runs a few percent faster; ``auto``: ``block`` (``whole``
        where no block is repeated) on a GPU, and on a CPU that has a C++ compiler; ``off``: eager.

        ``everywhere``: in evaluation and sampling, too; without it, on a GPU alone, since on a CPU another shape or mode
        takes longer to compile than a few samples take. Nothing is compiled before it first runs, and state-dict keys do
        not change.
        """
        self._everywhere = self.device.type != "cpu" if everywhere is None else everywhere
        if mode == "auto":
            cpu = self.device.type == "cpu" and any(shutil.which(name) for name in ("c++", "g++", "clang++"))
            able = cpu or self.device.type == "cuda"
            mode = "off" if not able else "block" if any(True for _ in self.model.branches()) else "whole"
        if mode == "whole" and any(m.custom_backward for m in self.model.modules() if isinstance(m, RegionModule)):
            mode = "block"
        if mode == "whole" and self.loss_module is not None:
            compile_in_place(self.loss_module)
        elif mode != "off":
            for block in self.model.branches():
                compile_in_place(block)
        self.compile_mode = mode

    # -- training and evaluation ------------------------------------------------------------------------------------

    def _parts(self) -> tuple[Process, LossModule]:
        if self.process is None or self.loss_module is None:
            raise UserError(
                "this blueprint is a graph without a process: add process, objective and sample to train or sample"
            )
        return self.process, self.loss_module

    @property
    def trained(self) -> nn.Module:
        """What is called with a draw, a batch and keys to train, and gives nats [b] and saved ports."""
        return self._parts()[1]

    def draw(self, batch: Batch, *, random: Randomness, t: Tensor | None = None, xt: Tensor | None = None) -> Draw:
        """One draw of the forward process for ``batch``."""
        process, _ = self._parts()
        return process.objective.corrupt(batch, process.kernel, process.schedule, random=random, t=t, xt=xt)

    def loss(self, x0: Tensor | Batch, *, t: Tensor | None = None, xt: Tensor | None = None) -> Tensor:
        """Nats per sequence, float32 [b], with gradients: one draw of the objective.

        ``x0`` is int64 [b, l] or a :class:`Batch` with roles. ``t`` float32 [b] and ``xt`` int64 [b, l] fix the draw;
        with ``t`` given the value is the integrand at that time. Randomness comes from torch's global generator.
        """
        _, module = self._parts()
        batch = (x0 if isinstance(x0, Batch) else Batch.of(x0)).to(self.device)
        self._check_tokens(batch.tokens)
        random = Randomness(torch.Generator(self.device).manual_seed(int(torch.randint(2**62, ()))))
        draw = self.draw(
            batch,
            random=random,
            t=None if t is None else t.to(self.device),
            xt=None if xt is None else xt.to(self.device),
        )
        key = random.keys(batch.tokens.shape[0]) if self.model.training else None
        loss: Tensor = module(draw, batch, key)[0]
        return loss

    def _check_tokens(self, tokens: Tensor) -> None:
        process, _ = self._parts()
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise UserError(f"tokens must be int64 [batch, length], not {tokens.dtype} {list(tokens.shape)}")
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= process.kernel.data_tokens):
            raise UserError(
                f"tokens run from {int(tokens.min())} to {int(tokens.max())}; this model has {process.kernel.data_tokens} (0 to {process.kernel.data_tokens - 1})"
            )

    @property
    def caveat(self) -> str | None:
        """Why the bound is not to be compared with those of other models, in words; None where it may be."""
        return None

    @torch.no_grad()
    def bound_rows(
        self,
        batch: Batch,
        *,
        seed: int,
        draws: int = 1,
        on_draw: Callable[[Objective, Draw, Tensor], None] | None = None,
    ) -> Tensor:
        """The bound of each sequence, nats, float64 [b] on the CPU, averaged over ``draws``; evaluation mode.

        ``on_draw(objective, draw, nats [b])`` sees every draw, and the objective that it was held to.
        """
        process, _ = self._parts()
        batch = batch.to(self.device)
        total = torch.zeros(batch.tokens.shape[0], dtype=torch.float64)
        with self._evaluating():
            for number in range(draws):
                generator = torch.Generator(self.device).manual_seed(mix_seed(seed, number))
                objective, draw = process.objective.bound_draw(
                    batch, process.kernel, process.schedule, random=Randomness(generator)
                )
                outputs, _ = self.model.run(feed(draw, batch, objective.block))
                nats = objective.loss(outputs, draw, batch, process.kernel, process.schedule)
                total += nats.double().cpu()
                if on_draw is not None:
                    on_draw(objective, draw, nats)
        return total / draws

    def bound(self, batches: Iterable[Tensor | Batch], *, draws: int = 1, seed: int = 0) -> Bound:
        """Bound on -log p over all sequences of ``batches``: mean nats per sequence and its standard error.

        The error is that of a mean over independent sequences; more ``draws`` make each sequence's value surer.
        """
        return mean_and_error(
            [
                self.bound_rows(b if isinstance(b, Batch) else Batch.of(b), seed=mix_seed(seed, i), draws=draws)
                for i, b in enumerate(batches)
            ]
        )

    @contextlib.contextmanager
    def _evaluating(self, *, eager: bool = False) -> Iterator[None]:
        """Evaluation mode; ``eager``, and always so unless what was compiled is so everywhere."""
        training = self.model.training
        self.model.eval()
        stance = (
            torch.compiler.set_stance("force_eager")
            if self.compile_mode != "off" and (eager or not self._everywhere)
            else contextlib.nullcontext()
        )
        try:
            with stance:
                yield
        finally:
            self.model.train(training)

    # -- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        batch: int,
        length: int,
        *,
        steps: int | None = None,
        prompt: Tensor | None = None,
        seed: int | None = None,
        attend: Tensor | None = None,
        given: Conditions | None = None,
        allowed: Tensor | None = None,
        classifier: Classifier | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw ``batch`` rows of ``length`` tokens, int64 [b, l] on the CPU.

        ``prompt`` int64 [b, l] (or [1, l]) holds tokens that stay, and -1 where the model fills in. ``attend`` bool
        [b, l] hides padding. The same ``seed`` gives the same rows on the same device. ``on_step(number, rows)`` sees
        every step. The mask and forbidden tokens never come out (unless a prompt holds them). ``given`` are conditions on the
        text, instead of those of the blueprint's ``sample``; ``allowed`` bool [n], [l, n] or [b, l, n] bounds the tokens further;
        ``classifier`` draws the text towards what it knows, instead of the blueprint's. Raises :class:`UserError` where conditions cannot be met, and where
        ``steps`` is given and the blueprint's sampler takes none (``process.sampler.steps`` is None).

        Under an objective of blocks the sampler runs in each block from left to right, with ``steps`` of its own; a prompt may
        hold nothing behind the first block that is open. What ends within a block is the beginning of a whole one.
        """
        process, _ = self._parts()
        if batch < 1 or length < 1:
            raise UserError(f"sample: batch and length must be at least 1, not {batch} and {length}")
        if steps is not None and steps < 1:
            raise UserError(f"sample: steps must be at least 1, not {steps}")
        conditions = process.sampler.config if given is None else given
        if (lack := lacks(conditions, process.kernel)) is not None:
            raise UserError(f"sample: this needs {lack}, not {type(process.kernel).__name__}")
        if classifier is None and process.classifier is not None:
            classifier = process.classifier.guide(process.schedule)
        moves = process.kernel.mask is None or not process.kernel.clamp_safe
        if classifier is not None and moves and "log_score" not in process.sampler.reads:
            raise UserError(
                "sample: a classifier gives factors for scores where seen tokens move; take a sampler that reads log_score, such as analytic"
            )
        may = self._allowed(conditions, allowed, batch, length)
        chosen = int(torch.randint(2**62, ())) if seed is None else seed
        generator = torch.Generator(self.device).manual_seed(mix_seed(chosen))
        block = process.objective.block
        whole = length if block is None else -(-length // block) * block
        if block is not None:
            if attend is not None:
                raise UserError("sample: text in blocks has no padding to hide: leave attend out")
            if classifier is not None or conditions.guidance != 1:
                raise UserError("sample: guidance and classifiers need the whole text, which in blocks there never is")
            if may.dim() > 1:  # what stands behind the end of the last block is cut off
                may = torch.cat([may, self.allowed.expand(*may.shape[:-2], whole - length, -1)], -2)  # type: ignore[union-attr]
        x = process.kernel.prior(batch, whole, generator=generator, allowed=may.reshape(-1, may.shape[-1]).any(0))
        free = torch.ones_like(x, dtype=torch.bool)
        if prompt is not None:
            if prompt.dim() != 2 or prompt.shape[1] != length or prompt.shape[0] not in (1, batch):
                raise UserError(f"sample: prompt must be [{batch}, {length}] (or one row), not {list(prompt.shape)}")
            prompt = prompt.to(self.device).expand(batch, length)
            self._check_tokens(prompt.clamp(min=0))
            prompt = torch.nn.functional.pad(prompt, (0, whole - length), value=-1)
            free = prompt < 0
            x = torch.where(free, x, prompt)
        ending = PositionwiseSuffix(self.graph.root)
        pattern = conditions.matching
        matching = None if pattern is None else Matching(pattern, self._spelled, self.device)
        if block is not None:
            how: dict[str, Any] = {"free": free, "kernel": process.kernel, "schedule": process.schedule, "steps": steps}
            how |= {"generator": generator, "allowed": may, "matching": matching, "length": length, "on_step": on_step}
            return self._write(x, block, ending, how)[:, :length].cpu()
        visible = torch.ones_like(free) if attend is None else attend.to(self.device).expand(batch, length)

        compiled = self.compile_mode != "off" and self._everywhere
        asked = 0

        def look(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
            nonlocal asked
            asked += len(rows)
            # Every other number of rows would be compiled anew: where that is done, the batch is filled up again.
            fill = -len(rows) % batch if compiled else 0
            if fill:
                x, t, rows = (torch.cat([v, v[:1].expand(fill, *v.shape[1:])]) for v in (x, t, rows))
                at = None if at is None else torch.cat([at, at[:1].expand(fill, -1)])
            inputs = {"tokens": x, "sigma": process.schedule.sigma(t), "t": t, "attend": visible[rows]}
            outputs = self.model.run(inputs)[0] if at is None else ending.run(self.model, inputs, at)
            return {name: value[: len(value) - fill] for name, value in outputs.items()} if fill else outputs

        denoise: Denoise = look
        if prompt is not None and conditions.guidance != 1:
            denoise = unprompted(denoise, free, process.kernel, conditions.guidance)
        if classifier is not None:
            denoise = classified(denoise, process.kernel, process.schedule, classifier, free)
        noisy = prompt is not None and conditions.observed == "renoise"
        if noisy:
            denoise = renoised(denoise, x, free, process.kernel, process.schedule, generator)
        with self._evaluating():
            out = process.sampler.run(
                denoise,
                x,
                free=free,
                kernel=process.kernel,
                schedule=process.schedule,
                generator=generator,
                steps=steps,
                allowed=may,
                matching=matching,
                timeless=classifier is None and not noisy and not {"sigma", "t"} & set(self.model.input_names),
                on_step=on_step,
            )
        process.sampler.evaluations = asked
        return out.cpu()

    def _write(self, x: Tensor, block: int, ending: PositionwiseSuffix, how: dict[str, Any]) -> Tensor:
        """Rows ``x`` block by block. Eager: what is remembered grows, and each length of it would be compiled anew."""
        process, _ = self._parts()
        hold_prompt(how["free"], block)
        rows, whole = x.shape
        with (
            self._evaluating(eager=True),
            cached(self.model, block, rows=rows, length=whole, suffix=ending) as given,
        ):
            return write_blocks(process.sampler, given, x, block=block, **how)

    def _allowed(self, conditions: Conditions, allowed: Tensor | None, batch: int, length: int) -> Tensor:
        """The tokens that may come out, bool [n], [l, n] or [b, l, n]. Raises :class:`UserError`."""
        assert self.allowed is not None
        may = self.allowed
        if allowed is not None:
            shape = (batch, length, len(may))
            if allowed.dtype != torch.bool or allowed.shape not in (shape, shape[1:], shape[2:]):
                raise UserError(
                    f"sample: allowed must be bool {list(shape[2:])}, {list(shape[1:])} or {list(shape)}, "
                    f"not {allowed.dtype} {list(allowed.shape)}"
                )
            may = may & allowed.to(self.device)
        return allowed_tokens(conditions, may, length, self._spelled)

    def _spelled(self) -> Sequence[bytes | None]:
        """The bytes of each state. Raises :class:`UserError` where there is no tokenizer."""
        if self._pieces is None:
            raise UserError("there is no tokenizer, so tokens have no text: build from a run folder that has one")
        pieces, states = self._pieces(), self._parts()[0].kernel.states
        return [*pieces, *[None] * (states - len(pieces))][:states]

    # -- keeping ----------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write ``model.safetensors`` and what else a run folder needs to be built again. Refuses a folder with a model in it."""
        folder = Path(directory)
        target = folder / "model.safetensors"
        if target.exists():
            raise UserError(f"{target} exists already; choose another folder")
        part = folder / ".model.safetensors.part"
        with disk_faults(target.name, folder):
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors({k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}, part)
            part.replace(target)
        if self._on_save is not None:
            self._on_save(folder)
