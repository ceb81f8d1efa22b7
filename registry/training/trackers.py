"""Experiment trackers: TensorBoard, trackio and Weights & Biases.

The packages of the trackers are optional dependencies, which are imported when a run starts.
"""

import importlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.data.network import unreachable
from sedd_graph.errors import EnvironmentFault
from sedd_graph.inputs.confine import require_inside
from sedd_graph.training.interfaces import Setting, Tracker

ERRORS = 2
"""Length of the error bars of held-out numbers, in standard errors."""


def _with_error_bars(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return ``metrics`` and, for each held-out number with a standard error, the ends of its error bar (``_low``, ``_high``)."""
    found = dict(metrics)
    for name, error in metrics.items():
        if name.endswith("standard_error") and math.isfinite(error):  # there is none of a single row
            prefix = re.escape(name.removesuffix("standard_error"))
            for measured in metrics:
                if re.fullmatch(rf"{prefix}(loss|(nats_)?per_\w+)", measured):
                    found[f"{measured}_low"] = metrics[measured] - ERRORS * error
                    found[f"{measured}_high"] = metrics[measured] + ERRORS * error
    return found


class TensorBoard(Tracker, kind="tracker"):
    """TensorBoard tracker, which writes event files to the folder ``tensorboard`` of the run.

    The settings of the run are a text, and the columns of the HPARAMS tab. The CUSTOM SCALARS tab draws held-out numbers
    with error bars of two standard errors.
    """

    package = "tensorboard"
    _settings: Mapping[str, Setting] = {}

    class Config(ComponentConfig):
        pass

    def describe(self, settings: Mapping[str, Setting]) -> None:
        self._settings = dict(settings)

    def start(self, run: Path, name: str) -> None:
        require_inside(run, "tensorboard")
        self._folder = str(run / "tensorboard")
        self._open(None)
        rows = (f"    {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in self._settings.items())
        self._writer.add_text("settings", "\n".join(rows), 0)
        summary = importlib.import_module("torch.utils.tensorboard.summary")
        for part in summary.hparams(dict(self._settings), {"loss": 0.0, "heldout_loss": 0.0}):
            self._writer.file_writer.add_summary(part)

    def _open(self, purge_step: int | None) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(self._folder, purge_step=purge_step)
        self._drawn = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        found = _with_error_bars(metrics)
        for key, value in found.items():
            self._writer.add_scalar(key, value, step)
        names = [key for key in metrics if key.startswith("heldout_") and f"{key}_low" in found]
        if names and not self._drawn:  # a writer takes one layout
            self._drawn = True
            charts = {key: ["Margin", [key, f"{key}_low", f"{key}_high"]] for key in names}
            self._writer.add_custom_scalars({"held-out text": charts})

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def resume(self, step: int) -> None:
        self._writer.close()
        self._open(step + 1)  # tensorboard ignores older events from this step on

    def close(self) -> None:
        self._writer.close()


class _Service(Tracker):
    """Base class of trackers whose package has run objects with methods ``log`` and ``finish``."""

    abstract = True
    _settings: Mapping[str, Setting] = {}
    _run: Any

    def describe(self, settings: Mapping[str, Setting]) -> None:
        self._settings = dict(settings)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(_with_error_bars(metrics), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio(_Service, kind="tracker"):
    """Tracker trackio, whose dashboard shows all runs of a blueprint.

    Its files are in the folder that the environment variable ``TRACKIO_DIR`` names, by default in
    ``~/.cache/huggingface/trackio``.
    """

    package = "trackio"

    class Config(ComponentConfig):
        pass

    def start(self, run: Path, name: str) -> None:
        self._module = importlib.import_module("trackio")
        self._run = self._module.init(project=name, name=run.name, config=dict(self._settings))

    def close(self) -> None:
        self._module.finish()


class Wandb(_Service, kind="tracker"):
    """Weights & Biases tracker; its files are in the run folder.

    It is configured by ``wandb login`` or the environment variable ``WANDB_MODE``.
    """

    package = "wandb"

    class Config(ComponentConfig):
        pass

    def start(self, run: Path, name: str) -> None:
        for folder in ("wandb", ".wandb"):  # the package uses the second if it exists
            require_inside(run, folder)
        module = importlib.import_module("wandb")
        settings = module.setup().settings
        # without a network the package would retry for a minute and a half
        if settings.mode == "online" and (reason := unreachable(settings.base_url)) is not None:
            raise EnvironmentFault(
                f"{settings.base_url} cannot be reached ({reason}); set WANDB_MODE=offline to log to the run folder, and "
                "upload it later with `wandb sync`"
            )
        self._run = module.init(project=name, name=run.name, dir=str(run), config=dict(self._settings))
