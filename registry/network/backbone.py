"""A complete network of the Hugging Face ``transformers`` library as one node (extra ``hub``).

The network is created from a config or a local folder: nothing is downloaded, and no remote code is executed.
"""

import importlib
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.exported import exported_as
from sedd_graph.errors import MissingExtraError

from .attention import attendable

_SUPPORTED = (
    "transformers_backbone takes an encoder or a decoder in which attention alone mixes positions and which runs on "
    "token vectors ('inputs_embeds'), such as bert, roberta, modernbert, llama, qwen3 or gpt2"
)


def _library() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError("transformers", extra="hub", purpose="transformers_backbone") from None


def _plain_init(self: Any, config: ComponentConfig, context: Context) -> None:
    """Construct the backbone in exported code, from the settings of the library model."""
    from transformers import AutoConfig, AutoModel

    nn.Module.__init__(self)
    settings = AutoConfig.for_model(**self.settings)
    self.inner = AutoModel.from_config(settings, attn_implementation="sdpa", dtype=torch.float32)
    if getattr(self.inner, "pooler", None) is not None:
        self.inner.pooler = None
    self.inner.set_input_embeddings(nn.Identity())


class TransformersBackbone(Component, kind="backbone"):
    """Encoder or decoder of the transformers library, applied to embeddings, bidirectional and without dropout.

    A decoder's causal mask is replaced by a mask of padding only. The library's token embedding and pooler are omitted:
    connect ``token_embedding`` to ``x``. Dropout is disabled because it uses torch's global generator, with which it
    could neither be split over processes nor be replayed in the backward pass.

    Raises:
        ValueError: The library cannot create or load the model, the model's width is not that of ``x``, or the
            architecture is not supported (encoder-decoders, recurrent models, vision and audio models).
        MissingExtraError: The package transformers is not installed.
    """

    class Config(ComponentConfig):
        config: dict[str, Any] | None = None
        """A config of the library, including ``model_type``, such as ``{model_type: llama, hidden_size: 64, ...}``; the
        weights are initialised at random. Exactly one of ``config`` and ``folder`` is required."""
        folder: Annotated[str, pydantic.Field(max_length=1024)] | None = None
        """A local folder with ``config.json`` and weights, or with a GGUF file, which contains both. The path is
        relative to the working directory and must be inside it."""
        gguf: Annotated[str, pydantic.Field(max_length=256)] | None = None
        """Name of a GGUF file in ``folder``."""

        @pydantic.model_validator(mode="after")
        def _one_source(self) -> "TransformersBackbone.Config":
            if (self.config is None) == (self.folder is None):
                raise ValueError("give exactly one of 'config' and 'folder'")
            if self.config is not None and not isinstance(self.config.get("model_type"), str):
                raise ValueError("'config' needs a 'model_type', such as llama, bert or modernbert")
            if self.config is not None and "auto_map" in self.config:
                raise ValueError("'auto_map' would run code that comes with a model: not allowed")
            if self.gguf is not None and (self.folder is None or Path(self.gguf).name != self.gguf):
                raise ValueError("'gguf' is the name of a file in 'folder'")
            return self

    config: Config

    @exported_as(_plain_init)
    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.inner = self._made(_library())
        made, width = self.inner.config, self.axis("d")
        if made.is_encoder_decoder:
            raise ValueError(f"{made.model_type!r} is an encoder-decoder; {_SUPPORTED}")
        if (found := getattr(made, "hidden_size", None)) != width:
            raise ValueError(f"the library model is {found} wide, but {width} comes in")
        if getattr(self.inner, "pooler", None) is not None:
            self.inner.pooler = None  # its output is not used, so that no gradient would reach it
        if hasattr(made, "use_cache"):
            made.use_cache = False
        # modules of a decoder's attention have ``is_causal``; a mask of all pairs of positions overrides it
        self.causal = any(getattr(m, "is_causal", False) for m in self.inner.modules())
        self._check_architecture()

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the library model that differ from its defaults, ``model_type`` included: plain data."""
        found: dict[str, Any] = self.inner.config.to_diff_dict()
        left = ("transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype")
        return {**{k: v for k, v in found.items() if k not in left}, "model_type": self.inner.config.model_type}

    def train(self, mode: bool = True) -> "TransformersBackbone":
        """Set the training mode of this module, but keep the library model in evaluation mode, without dropout."""
        super().train(mode)
        self.inner.eval()
        return self

    def _made(self, library: Any) -> Any:
        """Make or load the library model; on the meta device, make it without reading weights."""
        options = {"attn_implementation": "sdpa", "dtype": torch.float32, "trust_remote_code": False}
        folder = None if self.config.folder is None else self._inside(self.config.folder)
        local = {"local_files_only": True} | ({"gguf_file": self.config.gguf} if self.config.gguf else {})
        try:
            if folder is not None and torch.empty(0).device.type != "meta":
                return library.AutoModel.from_pretrained(folder, **local, **options)
            if folder is not None:
                made = library.AutoConfig.from_pretrained(folder, **local, trust_remote_code=False)
            else:
                made = library.AutoConfig.for_model(**(self.config.config or {}))
            return library.AutoModel.from_config(made, **options)
        except Exception as error:  # of many classes
            raise ValueError(f"transformers cannot make this model: {_first_line(error)}") from error

    @staticmethod
    def _inside(folder: str) -> Path:
        """Return ``folder``, or raise ValueError if it is not a folder inside the working directory."""
        path = Path(folder)
        if path.is_absolute() or not path.resolve().is_relative_to(Path.cwd().resolve()):
            raise ValueError(f"folder {folder!r} is not inside the working directory")
        if not path.is_dir():
            raise ValueError(f"folder {folder!r} does not exist")
        return path

    def _check_architecture(self) -> None:
        """Raise ValueError unless the model maps three vectors to three in which the first depends on the last."""
        kind, width = self.inner.config.model_type, self.axis("d")
        x = torch.arange(3.0 * width).sin().view(1, 3, width)
        try:
            self.inner.set_input_embeddings(nn.Identity())
            self.inner.eval()
            with torch.no_grad():
                out, other = self(x), self(torch.cat([x[:, :2], -x[:, 2:]], 1))
        except Exception as error:
            raise ValueError(f"{kind!r} does not run: {_first_line(error)}; {_SUPPORTED}") from error
        if out.shape != x.shape or (not out.is_meta and torch.equal(out[:, 0], other[:, 0])):
            raise ValueError(f"in {kind!r} not every position depends on every other; {_SUPPORTED}")

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        c: Float[Tensor, "b d"] | None = None,
        attend: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l d"]:
        """Apply the library model to embeddings.

        Args:
            x: Token embeddings, [b, l, d].
            c: Conditioning vector of each row, added at all positions, [b, d].
            attend: False at positions that no position of the same row may attend to, [b, l]. In a row that is entirely
                false, every position may be attended to, so that the output stays finite.

        Returns:
            The last hidden state, [b, l, d].
        """
        if c is not None:
            x = x + c[:, None].to(x.dtype)
        mask, seen = None, attendable(attend)
        if self.causal:
            b, l = x.shape[:2]
            mask = x.new_zeros(b, 1, l, l)
            if seen is not None:
                mask = mask.masked_fill(~seen[:, None, None, :], torch.finfo(x.dtype).min)
        elif seen is not None:
            mask = seen.long()
        out: Tensor = self.inner(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return out


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
