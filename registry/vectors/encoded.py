"""Kernel of vectors that a frozen encoder gives to the whole row.

Axes: b batch, l length, d width of a vector, v tokens.
"""

import hashlib
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from torch import Tensor, nn

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.vectors.contextual import ContextualKernel
from sedd_graph.diffusion.vectors.kernel import VectorKernelConfig
from sedd_graph.errors import MissingExtraError, SeddGraphError, UserError
from sedd_graph.inputs.confine import confined
from sedd_graph.inputs.files import open_file, require_file

__all__ = ["EncodedGaussian", "encoder_digest"]

LARGEST = 64 * 2**30
"""Largest accepted size of a file of an encoder, in bytes."""
MIX = 0.5
"""Weight of the vectors of both neighbours in the stand-in for an encoder."""


class EncodedGaussian(ContextualKernel, kind="vector_kernel"):
    """Contextual vectors of a frozen encoder, with Gaussian noise in continuous time (ELF, arXiv 2605.10938).

    x_0 is the last hidden state of an encoder of the transformers library (extra ``hub``), such as T5-small, on the whole row
    of tokens, minus ``mean``, divided by ``std``; x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise. The encoder is read from a local
    folder, from safetensors alone, without code; it is neither trained nor saved with the weights, and only needed where clean
    text is encoded: in training, evaluation and filling in, not in sampling. The network reads tokens from vectors.

    Without ``encoder`` a stand-in takes its place: a fixed random vector for each token, to which half of the vectors of both
    neighbours is added.
    """

    example: ClassVar[Mapping[str, Any]] = {"vocab": 4, "width": 2}

    class Config(VectorKernelConfig):
        encoder: Annotated[str, pydantic.Field(min_length=1, max_length=1024)] | None = None
        """A local folder with ``config.json`` and ``*.safetensors`` of an encoder, or of an encoder-decoder of which the encoder is
        taken, below the working directory; null: a stand-in with random vectors."""
        sha256: Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")] | None = None
        """SHA-256 of the contents of ``config.json`` and the ``*.safetensors`` files, by name, one after another; required with
        ``encoder``. Another encoder is refused."""
        mean: Annotated[float, pydantic.Field(ge=-1e4, le=1e4)] = 0.0
        """Number that is subtracted from every coordinate, from -10,000 to 10,000."""
        std: Annotated[float, pydantic.Field(ge=1e-4, le=1e4)] = 1.0
        """Number that every coordinate is divided by, from 0.0001 to 10,000, so that a coordinate has about mean square 1; 0.2 for T5-small as
        published."""
        seed: Annotated[int, pydantic.Field(ge=0, lt=2**63)] = 0
        """Seed of the random vectors of the stand-in."""

        @pydantic.model_validator(mode="after")
        def _digest_given(self) -> "EncodedGaussian.Config":
            if (self.encoder is None) != (self.sha256 is None):
                raise ValueError(
                    "give 'encoder' with its 'sha256', or neither: cat config.json *.safetensors | sha256sum, in its folder, prints it"
                )
            return self

    config: Config
    places: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        given = self.config
        generator = torch.Generator().manual_seed(given.seed)
        shape = (given.vocab, given.width) if given.encoder is None else (0, 0)
        self.register_buffer("places", torch.randn(shape, generator=generator, device="cpu"), persistent=False)
        self._read: dict[torch.device, nn.Module] = {}  # no submodule: neither trained nor saved

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        changes = {"vocab": states, "width": 2, "encoder": None, "sha256": None, "mean": 0.0, "std": 1.0}
        return config.model_copy(update=changes)

    @torch.no_grad()
    def place(self, table: Tensor) -> None:
        self.places.copy_(table)

    def encode(self, tokens: Tensor, attend: Tensor) -> Tensor:
        found = self._mixed(tokens, attend) if self.config.encoder is None else self._hidden(tokens, attend)
        return (found - self.config.mean) / self.config.std

    def _mixed(self, tokens: Tensor, attend: Tensor) -> Tensor:
        """Return the stand-in's vectors, [b, l, d]: of variance 1 away from both ends of a row."""
        own = torch.where(attend[..., None], self.places[tokens], 0.0)
        around = torch.nn.functional.pad(own, (0, 0, 1, 1))
        return (own + MIX * (around[:, :-2] + around[:, 2:])) / math.sqrt(1 + 2 * MIX**2)

    def _hidden(self, tokens: Tensor, attend: Tensor) -> Tensor:
        """Return the encoder's last hidden states, float32 [b, l, d]."""
        if tokens.device not in self._read:
            self._read[tokens.device] = self._load().to(tokens.device)
        with torch.autocast(tokens.device.type, enabled=False):
            found: Tensor = self._read[tokens.device](input_ids=tokens, attention_mask=attend.long()).last_hidden_state
        return found.float()

    def _load(self) -> nn.Module:
        """Read the encoder. Raises :class:`UserError` if it is missing, another than declared, or does not fit."""
        given = self.config
        where = f"process.encoder: {given.encoder}"
        folder = confined(given.encoder or "", Path.cwd(), what="process.encoder")
        if (found := encoder_digest(folder)) != given.sha256:
            raise UserError(
                f"{where} is another encoder than the one declared: its SHA-256 is {found}, not {given.sha256}; name the right folder, or, for a "
                f"new model, write sha256: {found}"
            )
        try:
            library = importlib.import_module("transformers")
        except ImportError:
            raise MissingExtraError("transformers", extra="hub", purpose="encoded_gaussian") from None
        how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
        try:
            model, loading = library.AutoModelForTextEncoding.from_pretrained(
                str(folder), dtype=torch.float32, output_loading_info=True, **how
            )
        except SeddGraphError:
            raise
        except Exception as error:  # the library's readers raise many classes for a broken file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{where} cannot be read as a text encoder: {reason}") from None
        missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
        if missing:  # the library would fill them with random numbers
            raise UserError(f"{where} has no weights for {', '.join(missing[:3])}: it is not a complete encoder")
        width, tokens = model.config.hidden_size, model.config.vocab_size
        if width != given.width or tokens < given.vocab:
            raise UserError(
                f"{where} gives {tokens:,} tokens vectors of {width}, but the kernel has {given.vocab:,} tokens and the width {given.width}: it needs at "
                f"least as many tokens, and width: {width}"
            )
        made: nn.Module = model.eval().requires_grad_(False)
        return made


def encoder_digest(folder: Path) -> str:
    """Return the SHA-256 of an encoder's ``config.json`` and ``*.safetensors``, 64 hexadecimal digits.

    Args:
        folder: The folder.

    Raises:
        UserError: It is no folder with these files, or one of them is no regular file.
    """
    if not folder.is_dir():
        raise UserError(f"process.encoder: there is no folder {folder}; encoders are not downloaded")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        raise UserError(f"process.encoder: {folder} needs config.json and *.safetensors (other formats can hold code)")
    found = hashlib.sha256()
    for file in (folder / "config.json", *weights):
        require_file(file, limit=LARGEST)
        with open_file(file, limit=LARGEST) as stream:
            while block := stream.read(2**22):
                found.update(block)
    return found.hexdigest()
