"""Samplers for programs that evaluate the network themselves: the step function of SGLang's interface for diffusion models.

SGLang (`sglang.srt.dllm`) evaluates the network on one block of each request, passes the logits to an algorithm, and
repeats this until the algorithm reports that the block is done. :class:`BlockSteps` is such an algorithm, and needs no SGLang.
Axes: b requests, l positions of a block, n tokens of the network's vocabulary, the mask included.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import pydantic
import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.base import Context
from sedd_graph.component.registry import Registry, discover
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.groups import Groups
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.row_noise import RowNoise, part_seeds
from sedd_graph.diffusion.tokens.sampler import Sampler, Stepwise, chosen_steps
from sedd_graph.diffusion.tokens.stage import Stage, StagedDenoise
from sedd_graph.diffusion.tokens.walk import SamplerConfig, Walk, WalkSettings
from sedd_graph.errors import UserError, listed

__all__ = ["BlockState", "BlockSteps", "ForwardBatch"]


class ForwardBatch(Protocol):
    """What is read of SGLang's ``ForwardBatch``.

    Attributes:
        batch_size: Number of requests, b.
        input_ids: Tokens of one block of each request, int64 [b * l]; :meth:`BlockSteps.step` writes the new tokens here.
        positions: Positions of these tokens in their requests, int64 [b * l].
        rids: Name of each request, from which its seed follows; None: the requests have seeds.
        sampling_info: Settings of the requests (SGLang's ``SamplingBatchInfo``), of which ``temperatures`` and ``top_ps``,
            float [b] or [b, 1], ``top_ks``, int [b], and ``sampling_seed``, int64 [b] or None, are read; None: no settings.
    """

    batch_size: int
    input_ids: Tensor
    positions: Tensor
    rids: Sequence[str] | None
    sampling_info: Any


@dataclasses.dataclass
class BlockState:
    """Progress of one block of a request between two evaluations of the network.

    Attributes:
        seed: Seed of the block's noise.
        config: Config of the sampler for this request.
        number: Number of evaluations of the network so far.
        call: Number of the next random choice; None before the first evaluation.
        kept: What the sampler keeps of the row (:class:`~sedd_graph.diffusion.tokens.sampler.Stepwise`), tensors [1, ...].
    """

    seed: int
    config: SamplerConfig
    number: int = 0
    call: int | None = None
    kept: tuple[Tensor, ...] = ()

    @property
    def alike(self) -> tuple[int, int | None, float, float]:
        """What blocks have in common that one call of the sampler advances together."""
        return self.number, self.call, self.config.temperature, self.config.top_p


class BlockSteps:
    """A sampler of ours as an algorithm of SGLang's dLLM interface, for networks that predict masked tokens.

    The network must not depend on time: LLaDA, Dream, SDAR and block diffusion (BD3-LM) read the noise level from the masks. A
    block is drawn with the same tokens alone and in any batch, and with those that :meth:`sedd_graph.Engine.sample` draws for
    a request of the same seed (``seeds``) where logits are the same.

    Args:
        sampler: Name of the sampler as ``op``, and keys of its Config, as in a blueprint's ``sample`` section:
            ``confidence`` (low-confidence remasking), ``first_hitting``, ``ancestral`` or ``entropy_bound``. ``steps`` are those
            of one block. ``temperature`` and ``top_p`` hold for all requests if they are given here, else each request's own.
        mask_id: Id of the mask.
        block_size: Number of positions of a block, l.
        seed: Seed of requests that have none of their own, together with the name of the request.
        forbidden: Ids of tokens that are never drawn.
        registry: The installed components; None: all that are installed.

    Raises:
        UserError: The sampler does not exist, its steps cannot be taken one at a time, or a key of its Config is invalid.
    """

    def __init__(
        self,
        sampler: Mapping[str, Any],
        *,
        mask_id: int,
        block_size: int,
        seed: int = 0,
        forbidden: Iterable[int] = (),
        registry: Registry | None = None,
    ) -> None:
        self.mask_id, self.block_size, self.seed = mask_id, block_size, seed
        if mask_id < 0 or block_size < 1:
            raise UserError(f"mask_id must be at least 0 and block_size at least 1, not {mask_id} and {block_size}")
        self._registry = discover() if registry is None else registry
        self._forbidden = sorted({mask_id, *forbidden})
        self._sampler, self._fixed = self._made(sampler)
        self._steps = chosen_steps(None, self._sampler.steps)
        self._kernel: Kernel | None = None
        self._schedule: Schedule = self._component("loglinear", {})

    def _made(self, declared: Mapping[str, Any]) -> tuple[Any, set[str]]:
        """Return the sampler, which is a :class:`Sampler` and :class:`Stepwise`, and the keys of its Config that were given."""
        keys = {key: value for key, value in declared.items() if key != "op"}
        if not isinstance(op := declared.get("op"), str):
            raise UserError("sampler: give the name of a sampler as op, such as {'op': 'confidence', 'steps': 8}")
        made = self._component(op, keys)
        if not isinstance(made, Sampler) or not isinstance(made, Stepwise):
            samplers = [e for e in self._registry if self._registry.contract(e.op).kind == "sampler"]
            fit = [e.name for e in samplers if issubclass(self._registry.component(e.op), Stepwise)]
            raise UserError(f"sampler {op!r} cannot take its steps one at a time; {listed(fit)} can")
        return made, keys.keys() & {"temperature", "top_p"}

    def _component(self, op: str, keys: Mapping[str, Any], states: int = 2) -> Any:
        cls = self._registry.component(op)
        try:
            config = cls.Config.model_validate(dict(keys), strict=False)
        except pydantic.ValidationError as error:
            found = "; ".join(f"{'.'.join(str(p) for p in e['loc']) or op}: {e['msg']}" for e in error.errors())
            raise UserError(f"sampler {op!r}: {found}") from None
        return cls(config, Context({"n": states}))

    # -- SGLang's interface -------------------------------------------------------------------------------------------

    def max_steps(self, block_size: int) -> int:
        """Return the largest number of evaluations that a block needs, the one of the finished block included."""
        return max(self._steps, block_size) + 1

    def init_step_state(self, forward_batch: ForwardBatch) -> list[BlockState]:
        """Return the state of each block of a batch before its first evaluation.

        Args:
            forward_batch: The batch, whose ``positions`` say where in its request each block starts.

        Raises:
            UserError: A request has neither a seed nor a name.
        """
        info = forward_batch.sampling_info
        start = forward_batch.positions.view(forward_batch.batch_size, -1)[:, 0].cpu()
        seeds = part_seeds(torch.tensor(self._seeds(forward_batch), dtype=torch.int64), start.long()).tolist()
        temperatures, tops, greedy = (
            (_numbers(info, "temperatures"), _numbers(info, "top_ps"), [k == 1 for k in _numbers(info, "top_ks") or []])
            if info is not None
            else (None, None, [])
        )
        states = []
        for row, seed in enumerate(seeds):
            own: dict[str, float] = {}
            if temperatures is not None and "temperature" not in self._fixed:
                own["temperature"] = 0.0 if greedy and greedy[row] else temperatures[row]
            if tops is not None and "top_p" not in self._fixed:
                own["top_p"] = tops[row]
            states.append(BlockState(seed, self._sampler.config.model_copy(update=own)))
        return states

    def step(self, forward_batch: ForwardBatch, full_logits: Tensor, states: Sequence[BlockState]) -> list[bool]:
        """Take one step of each block, given the network's logits for it.

        New tokens replace those of ``forward_batch.input_ids``, and ``states`` are advanced, both in place.

        Args:
            forward_batch: The batch that was evaluated.
            full_logits: Logits at its positions, float [b * l, n] or [b, l, n], or an object with this tensor as
                ``full_logits`` (SGLang's ``LogitsProcessorOutput``). The logit of the mask is ignored.
            states: State of each block.

        Returns:
            Whether each block had no mask before the step. Its tokens are then final, and the network was evaluated on
            them, so that a KV cache holds their keys and values.

        Raises:
            UserError: The logits are not those of such blocks, or are not finite.
        """
        size, ids = forward_batch.batch_size, forward_batch.input_ids.view(forward_batch.batch_size, -1)
        logits: Tensor = getattr(full_logits, "full_logits", full_logits)
        if len(states) != size or ids.shape[1] != self.block_size or logits.numel() != ids.numel() * logits.shape[-1]:
            raise UserError(
                f"step: {size} blocks of {self.block_size} tokens have as many states, and logits for each token, not "
                f"{len(states)} states, {list(ids.shape)} tokens and logits {list(logits.shape)}"
            )
        logits = logits.view(*ids.shape, logits.shape[-1])
        kernel = self._kernel_for(logits)
        done = (ids != self.mask_id).all(1).tolist()
        alike: dict[tuple[int, int | None, float, float], list[int]] = {}
        for row, (state, finished) in enumerate(zip(states, done, strict=True)):
            if not finished:
                alike.setdefault(state.alike, []).append(row)
        new = ids.clone()
        for rows in alike.values():
            index = torch.tensor(rows, device=ids.device)
            new[index] = self._advance(kernel, ids[index], logits[index], [states[row] for row in rows])
        forward_batch.input_ids.copy_(new.view_as(forward_batch.input_ids))
        return done

    # -- the sampler --------------------------------------------------------------------------------------------------

    def _seeds(self, forward_batch: ForwardBatch) -> list[int]:
        """Return the seed of each request: its own, or one that follows from its name."""
        if (given := getattr(forward_batch.sampling_info, "sampling_seed", None)) is not None:
            return [int(v) for v in given.reshape(-1).tolist()]
        if forward_batch.rids is None:
            raise UserError("step: the requests have neither seeds (sampling_info.sampling_seed) nor names (rids)")
        named = (hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=8).digest() for name in forward_batch.rids)
        return [int.from_bytes(digest, "little", signed=True) for digest in named]

    def _kernel_for(self, logits: Tensor) -> Kernel:
        """Return the masking process on as many tokens as there are logits, the last of which is the mask."""
        states = logits.shape[-1]
        if self._kernel is None or self._kernel.states != states:
            if states <= self._forbidden[-1]:
                raise UserError(f"step: {states:,} logits have no place for token {self._forbidden[-1]:,}")
            self._kernel = self._component("absorb", {}, states)
        return self._kernel

    def _advance(self, kernel: Kernel, ids: Tensor, logits: Tensor, states: list[BlockState]) -> Tensor:
        """Return the tokens of some blocks after a step, int64 [g, l], and advance their states.

        Args:
            kernel: The masking process.
            ids: Tokens, int64 [g, l].
            logits: Logits, float [g, l, n].
            states: States, which agree in :attr:`BlockState.alike`.
        """
        device, number, config = ids.device, states[0].number, states[0].config
        seeds = torch.tensor([state.seed for state in states], dtype=torch.int64)
        noise = RowNoise.of_parts(seeds, ids.shape[1], device=device)
        x = self._inner(ids, logits.shape[-1])
        allowed = torch.ones(logits.shape[-1], dtype=torch.bool, device=device)
        allowed[self._inner(torch.tensor(self._forbidden, device=device), logits.shape[-1])] = False
        settings = WalkSettings(
            free=torch.ones_like(x, dtype=torch.bool),
            kernel=kernel,
            schedule=self._schedule,
            generator=noise.generator,
            allowed=allowed,
            draws=noise,
            timeless=True,
            first_step=number,
        )
        sampler, steps = self._sampler, self._steps
        with torch.no_grad(), full_precision(x):
            walk = Walk(self._network(logits), x, settings, config)
            if (call := states[0].call) is None:
                kept = sampler.begin(walk, steps)
            else:
                noise.call = call
                kept = tuple(torch.cat(column) for column in zip(*(state.kept for state in states), strict=True))
            kept = sampler.advance(walk, kept, number, steps)
            walk.check_outputs()
        for row, state in enumerate(states):
            state.number, state.call = number + 1, noise.call
            state.kept = tuple(column[row : row + 1] for column in kept)
        outer = walk.x + (walk.x >= self.mask_id).long()
        return outer.masked_fill(walk.x == logits.shape[-1] - 1, self.mask_id)

    def _inner(self, ids: Tensor, states: int) -> Tensor:
        """Return the states of token ids: the mask is the last one, and the ids behind it move up."""
        return (ids - (ids > self.mask_id).long()).masked_fill(ids == self.mask_id, states - 1)

    def _network(self, logits: Tensor) -> StagedDenoise:
        """Return the network whose outputs follow from logits, [g, l, n], of the rows as they are."""

        def finish(values: Sequence[Tensor], groups: Groups) -> Mapping[str, Tensor]:
            found = values[0][groups.row[:, None], groups.place].float()
            data = torch.cat([found[..., : self.mask_id], found[..., self.mask_id + 1 :]], -1)
            return {"log_x0": F.pad(data.log_softmax(-1), (0, 1), value=-torch.inf)}

        def first(x: Tensor, t: Tensor, rows: Tensor) -> Stage:
            return Stage((logits[rows],), (True,), finish)

        return StagedDenoise(first)


def _numbers(info: Any, name: str) -> list[float] | None:
    """Return the values of a setting, one for each request; None if the program has no such setting."""
    found = getattr(info, name, None)
    return None if found is None else [float(v) for v in found.reshape(-1).tolist()]
