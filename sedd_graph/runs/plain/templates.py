"""Text of exported files around the generated classes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["configuration", "generation", "modeling"]

_CONFIGURATION = '''"""Config of {name}. Written by sedd_graph; it needs the transformers library alone."""

from transformers import PretrainedConfig


class {camel}Config(PretrainedConfig):
    """Config of {name}.

    Args:
        vocab_size: Number of token states: the tokens, and the mask if there is one.
        mask_token_id: The mask; None without one.
        tables: Tables of the noise process, which are numbers by name.
        min_sigma: Smallest total noise of the schedule.
        max_sigma: Largest total noise of the schedule.
    """

    model_type = "{slug}"

    def __init__(
        self, vocab_size={states}, mask_token_id={mask}, tables=None, min_sigma={low}, max_sigma={high}, **kwargs
    ):
        self.vocab_size = vocab_size
        self.mask_token_id = mask_token_id
        self.tables = tables or {{}}
        self.min_sigma = min_sigma
        self.max_sigma = max_sigma
        super().__init__(**kwargs)
'''

_MODELING = '''"""{name}: {description}

Written by sedd_graph from the graph of the model; it needs torch and the transformers library alone.
Axes: b batch, l length, v states.
"""

{imports}
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_{slug} import {camel}Config
from .generation_{slug} import SAMPLERS, Walk, make_process

{top}


{classes}


class {architecture}(PreTrainedModel, GenerationMixin):
    """{description}

    The logits are {logits}.
    """

    config_class = {camel}Config
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
{made}
        self.post_init()

    def _init_weights(self, module):
        """Do nothing: the constructors initialise the weights."""

    def network(self, {inputs}):
        """Return {output}, [b, l, v]."""
{run}

{forward}

{generate}
{second}'''

_GENERATION = '''"""The noise process and the samplers of {name}. Written by sedd_graph; it needs torch alone.

Axes: b batch, l length, n states.
"""

{imports}

{top}


{classes}


SAMPLERS = {{
{samplers}
}}


def make_process(tables, device):
    """Return the kernel and the schedule of the noise process; ``tables`` are those of the config."""
    kernel = {kernel}
    schedule = {schedule}
    return kernel, schedule
'''

_LOGITS = {
    "log_x0": "log-probabilities of the clean token at each position, in nats",
    "log_score": "log-scores (SEDD, arXiv 2310.16834): log p(y) / p(x) of every state y at each position, in nats",
}

_FORWARD = '''    def forward(self, input_ids, attention_mask=None, {extra}sigma=None, labels=None, return_dict=True, **kwargs):
        """Evaluate the network.

        Args:
            input_ids: Noisy tokens, int64 [b, l].
            attention_mask: 0 at padding, [b, l].
{clean_doc}            sigma: Total noise of each row, float32 [b]; None: {sigma_doc}.
            labels: Clean tokens, int64 [b, l], -100 where there is no loss; None: no loss.
            return_dict: False for a tuple.

        Returns:
            ``logits``, float32 [b, l, v], and ``loss`` if there are labels: cross-entropy, nats per token.
        """
{body}
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return MaskedLMOutput(loss=loss, logits=logits)
'''

_NOISE_LEVEL = '''
    def noise_level(self, input_ids):
        """Return the total noise at which the share of masked tokens is that of each row, float32 [b]."""
        share = (input_ids == self.config.mask_token_id).double().mean(1)
        sigma = -torch.log1p(-share.clamp(max=1 - 1e-12))
        return sigma.clamp(min=self.config.min_sigma, max=self.config.max_sigma).float()
'''

_GENERATE = '''    @torch.no_grad()
    def generate(
        self,
        input_ids=None,
        attention_mask=None,
        *,
        length=None,
        batch_size=1,
        steps=None,
        temperature=None,
        top_p=None,
        sampler=None,
        seed=None,
        **kwargs,
    ):
        """Generate token ids by reversing the noise process.

        Defaults are those of ``generation_config``.

        Args:
            input_ids: Prompt, int64 [b, l], with {free_doc} at the positions to generate; None: whole rows are generated.
            attention_mask: 0 at padding, [b, l].
            length: Tokens per row, without a prompt.
            batch_size: Rows, without a prompt.
            steps: Number of steps{steps_doc}.
            temperature: Probabilities of new tokens are raised to the power 1 / temperature.
            top_p: Share of the most likely tokens that new tokens are drawn from.
            sampler: Name of the sampler: one of ``SAMPLERS``.
            seed: Seed of the random numbers; None: random.

        Returns:
            Token ids, int64 [b, l].
        """
        if kwargs:
            raise TypeError(f"generate: unknown arguments: {{', '.join(kwargs)}}")
        defaults = self.generation_config
        sampler = sampler or getattr(defaults, "sampler", None) or "{default}"
        if sampler not in SAMPLERS:
            raise ValueError(f"generate: unknown sampler {{sampler!r}}; there are {{', '.join(SAMPLERS)}}")
        if steps is None:
            steps = getattr(defaults, "steps", None) or {steps}
        if steps < 1:
            raise ValueError(f"generate: steps must be at least 1, not {{steps}}")
        temperature = getattr(defaults, "temperature", None) if temperature is None else temperature
        top_p = getattr(defaults, "top_p", None) if top_p is None else top_p
        if input_ids is not None:
            batch_size, length = input_ids.shape
        elif length is None:
            raise ValueError("generate: give a prompt, or a length")
        generator = torch.Generator(self.device)
        generator.manual_seed(mix_seed(int(torch.randint(2**62, ())) if seed is None else seed))
        kernel, schedule = make_process(self.config.tables, self.device)
        allowed = torch.ones(kernel.states, dtype=torch.bool, device=self.device)
        allowed[[*(getattr(defaults, "suppress_tokens", None) or []){mask_too}]] = False
        whole = {whole}
        x = kernel.prior(batch_size, whole, generator=generator, allowed=allowed)
        free = torch.ones_like(x, dtype=torch.bool)
        if input_ids is not None:
            prompt = torch.nn.functional.pad(input_ids.to(self.device), (0, whole - length), value=-1)
            free = {free}
            x = torch.where(free, x, prompt)
{data_only}        options = {{
            "kernel": kernel,
            "schedule": schedule,
            "generator": generator,
            "allowed": {data},
            "temperature": 1.0 if temperature is None else temperature,
            "top_p": 1.0 if top_p is None else top_p,
            "spread": sampler in {spread},
        }}
{walk}'''

_WALK = """
        def denoise(x, t, rows, at=None):
            outputs = {evaluate}
            if at is not None:
                outputs = outputs.gather(1, at[..., None].expand(-1, -1, outputs.shape[-1]))
            return {{"{output}": outputs}}

        walk = Walk(denoise, x, free, timeless={timeless}, **options)
        SAMPLERS[sampler]().walk(walk, steps)
        walk.check_outputs()
        return walk.x
"""

_BLOCKS = """        hold_prompt(free, {block})
        for start in range(0, whole, {block}):
            here = slice(start, start + {block})
            if not bool(free[:, here].any()):
                continue
            before = x[:, :start]

            def denoise(noised, t, rows, at=None, before=before, start=start):
                inputs = block_inputs(noised, before[rows], block={block}, noised_from=start)
                outputs = self.network(**{{name: inputs[name] for name in {inputs!r}}})
                if at is not None:
                    outputs = outputs.gather(1, at[..., None].expand(-1, -1, outputs.shape[-1]))
                return {{"{output}": outputs}}

            walk = Walk(denoise, x[:, here], free[:, here], timeless=True, **options)
            SAMPLERS[sampler]().walk(walk, steps)
            walk.check_outputs()
            x = torch.cat([before, walk.x, x[:, start + {block} :]], dim=1)
        return x[:, :length]
"""

_SECOND = '''

class {camel}ForMaskedLM({architecture}):
    """{description}

    The logits are log-probabilities of the clean token at each position, in nats, from the log-scores.
    """

    def forward(self, input_ids, attention_mask=None, sigma=None, labels=None, return_dict=True, **kwargs):
        scores = super().forward(input_ids, attention_mask, sigma=sigma).logits
        mask = self.config.mask_token_id
        states = torch.arange(scores.shape[-1], device=scores.device)
        clean = scores.masked_fill(states == mask, -1e6).log_softmax(-1)
        carried = torch.where(states == input_ids[..., None], 0.0, -1e6)
        logits = torch.where((input_ids == mask)[..., None], clean, carried)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return MaskedLMOutput(loss=loss, logits=logits)
'''


def _lines(lines: Sequence[str], by: int = 8) -> str:
    return textwrap.indent("\n".join(lines), " " * by)


def configuration(values: Mapping[str, Any]) -> str:
    """Return the text of ``configuration_*.py``."""
    return _CONFIGURATION.format(**values)


def generation(
    values: Mapping[str, Any], top: tuple[Sequence[str], str], classes: Sequence[str], makes: Mapping[str, str]
) -> str:
    """Return the text of ``generation_*.py``."""
    samplers = [f"    {name!r}: lambda: {text}," for name, text in makes.items() if name not in ("kernel", "schedule")]
    return _GENERATION.format(
        **values,
        imports="\n".join(top[0]),
        top=top[1],
        classes="\n\n\n".join(classes),
        samplers="\n".join(samplers),
        kernel=makes["kernel"],
        schedule=makes["schedule"],
    )


def modeling(values: Mapping[str, Any], top: tuple[Sequence[str], str], classes: Sequence[str]) -> str:
    """Return the text of ``modeling_*.py``."""
    imports = {*top[0], "import torch", "from torch import nn"}
    if values["block"] is not None or "Tensor" in top[1]:
        imports.add("import torch")
    second = values["output"] == "log_score" and values["masks"]
    return (
        _MODELING.format(
            **{k: v for k, v in values.items() if k not in ("made", "run", "inputs")},
            imports="\n".join(sorted(imports)),
            top=top[1],
            classes="\n\n\n".join(classes),
            logits=_LOGITS[values["output"]],
            made=_lines(values["made"]),
            inputs=", ".join(values["inputs"]),
            run=_lines(values["run"]),
            forward=_forward(values),
            generate=_generate(values),
            second=_SECOND.format(**values) if second else "",
        ).rstrip()
        + "\n"
    )


def _padding(values: Mapping[str, Any]) -> list[str]:
    if "attend" in values["inputs"]:
        return [
            "attend = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()"
        ]
    return [
        "if attention_mask is not None and not bool(attention_mask.all()):",
        '    raise ValueError("this model has no input for padding: give rows of one length")',
    ]


def _forward(values: Mapping[str, Any]) -> str:
    block, inputs = values["block"], values["inputs"]
    body = _padding(values)
    if block is not None:
        body += [
            "clean_ids = input_ids if clean_ids is None else clean_ids",
            f"inputs = block_inputs(input_ids, clean_ids, block={block})",
            f"logits = self.network(**{{name: inputs[name] for name in {inputs!r}}})",
        ]
    else:
        if {"sigma", "t"} & set(inputs):
            body.append("if sigma is None:")
            body.append(
                "    sigma = self.noise_level(input_ids)"
                if values["masks"]
                else '    raise ValueError("give sigma, the total noise of each row: no mask tells it")'
            )
        if "t" in inputs:
            body.append("t = make_process(self.config.tables, input_ids.device)[1].time(sigma)")
        names = {"tokens": "input_ids"}
        body.append(f"logits = self.network({', '.join(names.get(name, name) for name in inputs)})")
    clean = (
        "            clean_ids: Clean tokens, of which a block reads those before it, [b, l]; None: ``input_ids``.\n"
    )
    text = _FORWARD.format(
        body=_lines(body),
        extra="clean_ids=None, " if block is not None else "",
        clean_doc=clean if block is not None else "",
        sigma_doc="that of the share of masks" if values["masks"] else "an error",
    )
    return text.rstrip("\n") + ("\n" + _NOISE_LEVEL.rstrip("\n") if values["masks"] and block is None else "")


def _generate(values: Mapping[str, Any]) -> str:
    block, inputs, masks = values["block"], values["inputs"], values["masks"]
    arguments = {"tokens": "x", "sigma": "schedule.sigma(t)", "t": "t", "attend": "visible[rows]"}
    walk = (
        _BLOCKS.format(**values)
        if block is not None
        else _WALK.format(
            **{k: v for k, v in values.items() if k != "inputs"},
            evaluate=f"self.network({', '.join(arguments[name] for name in inputs)})",
            timeless=not {"sigma", "t"} & set(inputs),
        )
    )
    padding = [s.replace("input_ids", "x") for s in _padding(values)]
    padding = [s.replace("attend = ", "visible = ") for s in padding]
    padding += ["free = free & visible"] if "attend" in inputs else []
    return _GENERATE.format(
        free_doc="the mask (or -1)" if masks else "-1",
        steps_doc=" per block" if block is not None else "",
        default=values["default"],
        spread=values["spread"],
        steps=values["steps"] or 1,
        mask_too=", kernel.mask" if masks else "",
        whole="length" if block is None else f"-(-length // {block}) * {block}",
        free="(prompt < 0) | (prompt == kernel.mask)" if masks else "prompt < 0",
        data_only=_lines(padding) + "\n",
        data="allowed",
        walk=walk.lstrip("\n") if block is not None else walk,
    ).rstrip("\n")
