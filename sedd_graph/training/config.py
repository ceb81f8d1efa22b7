"""The ``train`` section of a blueprint. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from sedd_graph.component.choice import Choice
from sedd_graph.component.strict import Strict
from sedd_graph.training.interfaces import LRSchedule, OptimizerFactory, Tracker

__all__ = [
    "CheckpointConfig",
    "EvaluateConfig",
    "SampleConfig",
    "TrainConfig",
]

Positive = Annotated[float, pydantic.Field(gt=0)]
Count = Annotated[int, pydantic.Field(ge=1, le=10**9)]


class EvaluateConfig(Strict):
    """Evaluations on held-out rows while training and at the end, with the averaged weights where there are any."""

    every: Count = 1000
    """Steps between evaluations."""
    batches: Count | None = 8
    """Held-out batches per evaluation; null for all. The evaluation at the end takes all."""
    draws: Annotated[int, pydantic.Field(ge=1, le=4096)] = 1
    """Draws of noise per row."""


class SampleConfig(Strict):
    """Samples drawn while training."""

    every: Count = 1000
    """Steps between samples."""
    rows: Annotated[int, pydantic.Field(ge=1, le=256)] = 1
    """Rows drawn each time."""
    steps: Annotated[int, pydantic.Field(ge=1, le=100_000)] = 32
    """Sampler steps, for samplers that take them."""


class CheckpointConfig(Strict):
    """Checkpoints written while training."""

    every: Count = 1000
    """Steps between checkpoints."""
    keep: Annotated[int, pydantic.Field(ge=1, le=1000)] = 2
    """Newest checkpoints that are retained."""


class TrainConfig(Strict):
    """Training of the network."""

    steps: Count = 1000
    """Optimizer steps."""
    budget_s: Positive | None = None
    """Seconds of training, compilation included. Training ends at the first of ``steps`` and ``budget_s``, and the learning
    rate follows whichever is further on."""
    batch: Count = 32
    """Rows per optimizer step, over all processes and accumulation."""
    accumulate: Annotated[int, pydantic.Field(ge=1, le=65536)] = 1
    """Backward passes per optimizer step."""
    optimizer: Annotated[OptimizerFactory, Choice("train.optimizer", default="adamw")] = pydantic.Field(
        default={"op": "adamw"}, validate_default=True
    )
    """The optimizer; AdamW where its keys stand without an op."""
    schedule: Annotated[LRSchedule, Choice("train.schedule", default="cosine_decay")] = pydantic.Field(
        default={"op": "cosine_decay"}, validate_default=True
    )
    """Learning-rate schedule after warm-up."""
    warmup: Annotated[int, pydantic.Field(ge=0, le=10**9)] = 100
    """Steps in which the learning rate rises linearly from 0."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient; null for no clipping."""
    ema: Annotated[float, pydantic.Field(gt=0, lt=1)] | None = 0.9999
    """Decay of the averaged weights, warmed up as (1 + n) / (10 + n); null for no average."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the network. ``auto``: bfloat16 autocast on GPUs that support it, else float32."""
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0
    """Seed of initial weights and of all random numbers of training."""
    compile: Literal["auto", "block", "whole", "off"] = "auto"
    """What ``torch.compile`` is applied to. ``block``: each repeated block; ``whole``: the network and its loss; ``off``:
    nothing; ``auto``: chosen by hardware and size."""
    log_every: Count = 50
    """Steps between records of the loss."""
    evaluate: EvaluateConfig | None = EvaluateConfig()
    """Evaluations on held-out rows; null for none."""
    sample: SampleConfig | None = None
    """Samples drawn while training; null for none."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints written while training."""
    trackers: Annotated[list[Annotated[Tracker, Choice("train.trackers")]], pydantic.Field(max_length=16)] = []
    """Services that metrics are sent to, beside ``metrics.jsonl``, which is always written."""

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
        return self
