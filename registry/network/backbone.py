"""A whole network of the ``transformers`` library as one node (extra ``hub``): encoders, and decoders with the mask lifted.

Only configs and local folders: nothing is fetched, and no code that comes with weights is ever run.
"""

import importlib
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.errors import MissingExtraError


def _library() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError("transformers", extra="hub", purpose="transformers_backbone") from None


class TransformersBackbone(Component, kind="backbone"):
    """Vectors in, vectors out, every token seeing every other. Conditioned by adding ``c`` to each vector, where connected.

    The library model's own token embeddings and pooler are left out: feed it from ``token_embedding``. So is its dropout,
    which draws from torch's global generator: it could be neither split over processes nor drawn again in a backward pass.
    """

    class Config(ComponentConfig):
        config: dict[str, Any] | None = None
        """A library config, ``model_type`` included, such as ``{model_type: llama, hidden_size: 64, ...}``."""
        folder: Annotated[str, pydantic.Field(max_length=1024)] | None = None
        """A local folder with ``config.json`` and weights (or a GGUF file, which holds both), relative to the working directory and inside it."""
        gguf: Annotated[str, pydantic.Field(max_length=256)] | None = None
        """The name of a GGUF file in ``folder``, read by the library's GGUF loader."""

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

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        library = _library()
        if self.config.folder is not None:
            self.inner = self._from_folder(library)
        else:
            rest = dict(self.config.config)
            kind = rest.pop("model_type")
            try:
                made = library.AutoConfig.for_model(kind, **rest)
            except (ValueError, KeyError) as error:
                raise ValueError(f"transformers knows no such config: {str(error).splitlines()[0]}") from None
            self.inner = self._fresh(library, made)
        width = self.inner.config.hidden_size
        if width != self.axis("d"):
            raise ValueError(f"the library model is {width} wide, but {self.axis('d')} comes in")
        self.inner.set_input_embeddings(nn.Identity())
        if getattr(self.inner, "pooler", None) is not None:
            self.inner.pooler = None  # nobody reads what it puts out, so that no gradient would reach it
        # A decoder's attention says that it is causal; given a whole mask of its own, it follows that instead.
        self.causal = any(getattr(m, "is_causal", False) for m in self.inner.modules())
        if hasattr(self.inner.config, "use_cache"):
            self.inner.config.use_cache = False

    def train(self, mode: bool = True) -> "TransformersBackbone":
        super().train(mode)
        self.inner.eval()
        return self

    @staticmethod
    def _fresh(library: Any, config: Any) -> Any:
        return library.AutoModel.from_config(
            config, attn_implementation="sdpa", dtype=torch.float32, trust_remote_code=False
        )

    def _from_folder(self, library: Any) -> Any:
        folder, here = Path(self.config.folder), Path.cwd().resolve()
        if folder.is_absolute() or not folder.resolve().is_relative_to(here):
            raise ValueError(f"folder {self.config.folder!r} is not inside the working directory")
        if not folder.is_dir():
            raise ValueError(f"folder {self.config.folder!r} does not exist")
        extra = {"gguf_file": self.config.gguf} if self.config.gguf else {}
        if torch.empty(0).device.type == "meta":  # only shapes are wanted
            made = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **extra)
            return self._fresh(library, made)
        return library.AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            dtype=torch.float32,
            **extra,
        )

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        c: Float[Tensor, "b d"] | None = None,
        attend: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l d"]:
        if c is not None:
            x = x + c[:, None].to(x.dtype)
        mask: Tensor | None = None
        if self.causal:
            b, l = x.shape[:2]
            mask = x.new_zeros(b, 1, l, l)
            if attend is not None:
                seen = attend | ~attend.any(-1, keepdim=True)
                mask = mask.masked_fill(~seen[:, None, None, :], torch.finfo(x.dtype).min)
        elif attend is not None:
            mask = (attend | ~attend.any(-1, keepdim=True)).long()
        out: Tensor = self.inner(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return out
