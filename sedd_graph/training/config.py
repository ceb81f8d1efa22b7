"""Config classes of the ``train`` section of a blueprint. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from sedd_graph.component.choice import Choice
from sedd_graph.component.strict import Strict
from sedd_graph.training.interfaces import Adapter, LRSchedule, OptimizerFactory, Tracker

__all__ = ["CheckpointConfig", "EvaluateConfig", "ParallelConfig", "SampleConfig", "TrainConfig"]

Positive = Annotated[float, pydantic.Field(gt=0)]
Pattern = Annotated[str, pydantic.Field(min_length=1, max_length=256)]
Count = Annotated[int, pydantic.Field(ge=1, le=10**9)]


class EvaluateConfig(Strict):
    """Settings ``train.evaluate``: evaluations on held-out rows during and after training.

    They use the averaged weights, or the trained weights if ``train.ema`` is null.
    """

    every: Count = 1000
    """Optimizer steps between evaluations."""
    batches: Count | None = 8
    """Held-out batches per evaluation during training; null for all. The evaluation after training uses all."""
    draws: Annotated[int, pydantic.Field(ge=1, le=4096)] = 1
    """Draws of time and noise per held-out row, over which the loss is averaged."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the network in evaluations and in samples during training. ``auto``: bfloat16 autocast on GPUs that
    support it, else float32."""


class SampleConfig(Strict):
    """Settings ``train.sample``: samples drawn during training."""

    every: Count = 1000
    """Optimizer steps between samples."""
    rows: Annotated[int, pydantic.Field(ge=1, le=256)] = 1
    """Number of samples drawn at a time."""
    steps: Annotated[int, pydantic.Field(ge=1, le=100_000)] = 32
    """Sampler steps; unused by a sampler without a fixed number of steps."""


class CheckpointConfig(Strict):
    """Settings ``train.checkpoint``: checkpoints written during training."""

    every: Count = 1000
    """Optimizer steps between checkpoints."""
    every_s: Positive | None = 1800.0
    """Longest time without a checkpoint, seconds: once it has passed, a checkpoint is written after the current step;
    null for no limit."""
    keep: Annotated[int, pydantic.Field(ge=1, le=1000)] = 2
    """Number of newest checkpoints that are retained."""


class ParallelConfig(Strict):
    """Settings ``train.parallel``: how several processes share the model. ``replicate * shard`` is their number."""

    replicate: Count | None = None
    """Number of replicas of the model, whose gradients are averaged; null for as many as the processes allow."""
    shard: Count | None = 1
    """Number of processes that share the weights, gradients and optimizer state of a replica (FSDP2); 1 for none, so that
    each process holds all of them (DDP); null for as many as the processes allow."""


class TrainConfig(Strict):
    """``train`` section of a blueprint: steps, optimizer, precision, evaluations, samples and checkpoints."""

    steps: Count = 1000
    """Number of optimizer steps."""
    budget_s: Positive | None = None
    """Time limit of training in seconds, compilation included; null for no limit. Training ends when ``steps`` or
    ``budget_s`` is reached. The progress of the learning-rate schedule is the larger of the shares of ``steps`` and of
    ``budget_s`` that are done."""
    batch: Count = 32
    """Rows per optimizer step, summed over all processes and accumulation steps."""
    accumulate: Annotated[int, pydantic.Field(ge=1, le=65536)] = 1
    """Gradient accumulation: backward passes per optimizer step."""
    optimizer: Annotated[OptimizerFactory, Choice("train.optimizer", default="adamw")] = pydantic.Field(
        default={"op": "adamw"}, validate_default=True
    )
    """The optimizer; a mapping without the key ``op`` configures AdamW."""
    schedule: Annotated[LRSchedule, Choice("train.schedule", default="cosine_decay")] = pydantic.Field(
        default={"op": "cosine_decay"}, validate_default=True
    )
    """Learning-rate schedule, which scales the peak learning rate and is multiplied by the warm-up; cosine decay by
    default."""
    freeze: Annotated[list[Pattern], pydantic.Field(max_length=256)] = []
    """Names of parameters that training leaves as they are, with ``*`` for any text; ``trunk.0`` is all below it. They have
    no gradient, optimizer state, weight decay or average of their own. Parameters of adapters are not frozen: with
    ``["*"]`` and ``adapters`` the adapters alone are trained."""
    adapters: Annotated[list[Annotated[Adapter, Choice("train.adapters")]], pydantic.Field(max_length=16)] = []
    """Adapters of weight matrices, whose own values they freeze; ``export`` merges them."""
    warmup: Annotated[int, pydantic.Field(ge=0, le=10**9)] = 100
    """Number of optimizer steps during which the learning rate rises linearly from 0."""
    clip: Positive | None = 1.0
    """Largest gradient norm; a gradient with a larger norm is scaled down to it. Null for no clipping."""
    ema: Annotated[float, pydantic.Field(gt=0, lt=1)] | None = 0.9999
    """Decay of the exponential moving average of the weights, limited to (1 + n) / (10 + n) at step n; null for no
    average."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the network. ``auto``: bfloat16 autocast on GPUs that support it, else float32."""
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0
    """Seed of the initial weights and of all random numbers in training."""
    compile: Literal["auto", "block", "whole", "cuda_graphs", "off"] = "auto"
    """Scope of ``torch.compile``. ``block``: each repeated block; ``whole``: the network and its loss; ``cuda_graphs``: as
    ``whole``, with kernels that a GPU records once and replays, for steps of few rows; ``off``: nothing; ``auto``:
    selected by hardware and size."""
    parallel: ParallelConfig = ParallelConfig()
    """How several processes, which ``torchrun`` starts, share the model."""
    log_every: Count = 50
    """Optimizer steps between log records of the loss."""
    evaluate: EvaluateConfig | None = EvaluateConfig()
    """Evaluations on held-out rows; null for none."""
    sample: SampleConfig | None = None
    """Samples drawn during training; null for none."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints written during training."""
    trackers: Annotated[list[Annotated[Tracker, Choice("train.trackers")]], pydantic.Field(max_length=16)] = []
    """Services to which metrics are sent, in addition to ``metrics.jsonl``."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _moved(cls, data: object) -> object:
        if isinstance(data, dict) and "final" in data:
            raise ValueError("'final' is now a key of the schedule: schedule: {op: cosine_decay, final: ...}")
        return data

    @pydantic.model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.batch % self.accumulate:
            raise ValueError(f"batch = {self.batch} is not a multiple of accumulate = {self.accumulate}")
        if self.compile == "cuda_graphs" and self.accumulate > 1:
            raise ValueError(
                "compile: cuda_graphs needs accumulate: 1: a second backward pass would overwrite the gradients of the first"
            )
        return self
