"""The ``train`` section of a blueprint. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from sedd_graph.component.strict import Strict

__all__ = [
    "AdamWConfig",
    "CheckpointConfig",
    "EvaluateConfig",
    "MuonConfig",
    "OptimizerConfig",
    "SampleConfig",
    "TrainConfig",
]

Positive = Annotated[float, pydantic.Field(gt=0)]
Count = Annotated[int, pydantic.Field(ge=1, le=10**9)]


class AdamWConfig(Strict):
    """AdamW (arXiv 1711.05101). Weight decay acts on matrices only."""

    op: Literal["adamw"]
    lr: Positive = 3e-4
    betas: tuple[Annotated[float, pydantic.Field(ge=0, lt=1)], Annotated[float, pydantic.Field(ge=0, lt=1)]] = (
        0.9,
        0.99,
    )
    eps: Positive = 1e-8
    weight_decay: Annotated[float, pydantic.Field(ge=0)] = 0.0


class MuonConfig(Strict):
    """Muon (Jordan et al. 2024; arXiv 2502.16982) for the matrices inside blocks, AdamW for embeddings, heads, vectors and all else."""

    op: Literal["muon"]
    lr: Positive = 3e-3
    """For the matrices, on AdamW's scale (updates are scaled to its root mean square, arXiv 2502.16982)."""
    momentum: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.95
    weight_decay: Annotated[float, pydantic.Field(ge=0)] = 0.0
    adamw: AdamWConfig = AdamWConfig(op="adamw", lr=3e-3)


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, pydantic.Field(discriminator="op")]
"""The optimizer, told apart by ``op``."""


class EvaluateConfig(Strict):
    """Held-out bounds on the way and at the end, on the averaged weights where there are any."""

    every: Count = 1000
    batches: Count | None = 8
    """How many held-out batches on the way (the end takes all)."""
    draws: Annotated[int, pydantic.Field(ge=1, le=4096)] = 1


class SampleConfig(Strict):
    """Samples on the way."""

    every: Count = 1000
    rows: Annotated[int, pydantic.Field(ge=1, le=256)] = 1
    steps: Annotated[int, pydantic.Field(ge=1, le=100_000)] = 32


class CheckpointConfig(Strict):
    """Checkpoints on the way; the last ``keep`` are kept."""

    every: Count = 1000
    keep: Annotated[int, pydantic.Field(ge=1, le=1000)] = 2


class TrainConfig(Strict):
    """How the engine is trained."""

    steps: Count = 1000
    budget_s: Positive | None = None
    """Seconds of training, compiling included: the learning rate then follows whichever of steps and seconds is
    further on, and training ends at the first of both (a first step that takes them all is said)."""
    batch: Count = 32
    """Rows per optimizer step, over all processes and accumulation."""
    accumulate: Annotated[int, pydantic.Field(ge=1, le=65536)] = 1
    """Backward passes per optimizer step."""
    optimizer: OptimizerConfig = AdamWConfig(op="adamw")
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Of the learning rate after warm-up."""
    warmup: Annotated[int, pydantic.Field(ge=0, le=10**9)] = 100
    """Steps in which the learning rate rises from 0."""
    final: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    """Share of the learning rate left at the end of ``cosine`` and ``linear``."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient."""
    ema: Annotated[float, pydantic.Field(gt=0, lt=1)] | None = 0.9999
    """Decay of the averaged weights (with a warm-up of (1 + n) / (10 + n))."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto``: bfloat16 autocast on GPUs that have it, else float32."""
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0
    compile: Literal["auto", "block", "whole", "off"] = "auto"
    log_every: Count = 50
    evaluate: EvaluateConfig | None = EvaluateConfig()
    sample: SampleConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: Annotated[list[Literal["tensorboard", "trackio", "wandb"]], pydantic.Field(max_length=3)] = []
    """Beside ``metrics.jsonl``, which is always written."""

    @pydantic.field_validator("optimizer", mode="before")
    @classmethod
    def _default_optimizer(cls, value: object) -> object:
        """``train.optimizer.lr=1e-3`` alone is AdamW's."""
        return {"op": "adamw", **value} if isinstance(value, dict) and "op" not in value else value

    @pydantic.model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.batch % self.accumulate:
            raise ValueError(f"batch = {self.batch} is not a multiple of accumulate = {self.accumulate}")
        return self
