"""Every built-in component passes the conformance kit or the proofs of its processes; broken ones fail the right check."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.check import Proof
from sedd_graph.component.kinds import KINDS
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.likelihood import Likelihood
from sedd_graph.errors import BlueprintError
from sedd_graph.families.plan import Part, ProcessPlan
from sedd_graph.families.tokens import make_parts
from sedd_graph.testing.conformance import ConformanceError, check_component
from sedd_graph.verify.tokens import prove_objective, prove_parts, prove_sampler
from tests.plans import maker, token_plan

Case = tuple[dict[str, Any], tuple[str, ...], dict[str, int]]


def case(config: dict[str, Any] | None = None, *connected: str, **axes: int) -> Case:
    """Return a config, the optional ports to connect, and sizes of axes."""
    return config or {}, connected, axes


BACKBONE = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 8,
}
RING = [[0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1], [3, 0, 0.1, 0]]
"""Rates without detailed balance."""
CASES: dict[str, list[Case]] = {
    "absorb": [case()],
    "act_norm": [case(), case({}, "attend")],
    "adaln_gate": [case(), case({}, "residual"), case({"dropout": 0.2}, "residual")],
    "adaln_modulate": [case(e=5)],
    "add": [case()],
    "affine": [case(), case({"clamp": 0.5}, "attend")],
    "attention": [
        case({"heads": 2}),
        case({"heads": 2, "qk_norm": "rms", "bias": "all", "dropout": 0.1}, "angles", "attend"),
        case({"heads": 2}, "angles", "attend", "sees"),
        case({"heads": 4, "kv_heads": 2}, "angles", "sees"),
    ],
    "concat": [case(), case({"pattern": "b * d"})],
    "condition_add": [case()],
    "cosine": [case(), case({"eps": 1e-2}), case({"offset": 0.008})],
    "cosine_squared": [case(), case({"eps": 1e-4})],
    "cubic": [case(), case({"eps": 1e-2})],
    "deletion_head": [case()],
    "insertion_head": [case()],
    "digit_code": [
        case({"vocab": 11, "digits": 4}),
        case({"vocab": 81, "base": 3, "digits": 4}),
        case({"vocab": 9, "base": 16, "digits": 1, "rms": 0.1}),
    ],
    "digits": [
        case({"vocab": 8, "digits": 3}),
        case({"vocab": 7, "digits": 3}),
        case({"vocab": 9, "base": 3, "digits": 2}),
    ],
    "consistency": [case(), case({"divergence": "forward", "rounds": 2}), case({"pairs": "student"})],
    "dct": [case({"over": over}, *ports) for over in ("channels", "sequence") for ports in ((), ("attend",))],
    "ddim": [case(), case({"eta": 0.7, "clamp": True})],
    "ddpm": [case()],
    "diffusion_lm": [case({"times": "low_discrepancy"})],
    "dropout": [case({"rate": 0.3})],
    "embedding_counts": [
        case({"counts": [[5, 1, 0, 2], [1, 1, 1, 1]], "label": 1}),
        case({"counts": [[5, 1, 0, 1], [1, 1, 1, 0], [0, 9, 2, 1]], "label": 2, "prior": [1, 2, 3], "strength": 3.0}),
    ],
    "betas": [case({"values": [0.1, 0.5, 1.0]}), case({"values": [0.3], "largest": 0.9})],
    "exact_likelihood": [case()],
    "feed_forward": [
        *(case({"activation": a}) for a in ("gelu", "gelu_exact", "swiglu", "squared_relu")),
        case({"hidden": 5, "bias": "none"}),
    ],
    "gap_head": [case(), case({"most": 3})],
    "gaussian_fourier": [case(), case({"frequencies": 8})],
    "encoded_gaussian": [case({"vocab": 9, "width": 3, "seed": 2})],
    "elf": [case({"decode": 0.5, "times": "independent", "method": "euler"})],
    "logit_normal": [case(), case({"mean": 0.0, "std": 1.0, "noise_scale": 1.0})],
    "gaussian": [case({"vocab": 9, "width": 3, "variance": "matched"}), case({"vocab": 5, "width": 2, "start": 0.05})],
    "gumbel": [case(), case({"location": 1.0, "scale": 0.5, "cutoff": 1e-3})],
    "langflow": [case({"times": "independent", "method": "euler", "probes": 2})],
    "logits_head": [case(), case({"bias": "none"}, "table")],
    "normalized_gaussian": [
        case({"vocab": 9, "width": 8, "normalize": "layer", "length": 6.0, "precondition": False}),
    ],
    "ode": [case({"refine": True})],
    "self_conditioning": [case(w=3)],
    "idlm": [case(), case({"credit": "row"})],
    "geometric": [case(), case({"sigma_min": 1e-3, "sigma_max": 10.0})],
    "hadamard": [case(), case(d=16)],
    "hadamard_code": [case({"vocab": 7}), case({"vocab": 16, "rms": 3.0}), case({"vocab": 8, "signs": False})],
    "join_clean": [case()],
    "join_sequence": [case({"mode": m, "of": of}, h=3) for m in ("halves", "interleave") for of in ("values", "mask")],
    "l2_attention": [case({"heads": 2}, r=4), case({"heads": 1, "bound": 0.5}, "attend", r=4)],
    "layer_norm": [case({"affine": a}) for a in ("none", "weight", "weight_bias")],
    "learned": [case(), case({"pieces": 2, "eps": 1e-2}), case({"pieces": 32})],
    "learned_code": [case({"vocab": 7}), case({"vocab": 40, "margin": 3.0, "weight": 0.0, "std": 0.02})],
    "learned_positions": [case({"max_length": 6})],
    "learned_time": [case()],
    "learned_power": [case(), case({"gamma": -1.0, "frequencies": [5, 1, 100]})],
    "linear": [case({"width": 5}), case({"width": 5, "bias": "none", "init": "zero"})],
    "linear_betas": [case(), case({"steps": 12, "beta_first": 0.05, "beta_last": 0.5, "end": False})],
    "linear_rate": [case(), case({"rate_min": 10.0, "rate_max": 10.0})],
    "lipschitz_act": [case({"activation": a}) for a in ("relu", "tanh", "elu", "lip_swish")],
    "lipschitz_linear": [case({"width": 5}), case({"width": 12, "bound": 2.0, "bias": "none"})],
    "loglinear": [case(), case({"eps": 1e-2})],
    "md4_cosine": [case(), case({"eps": 1e-3})],
    "mean": [case()],
    "mixture": [case(), case({"uniform": 0.5, "decay": 0.0}), case({"uniform": 1.0})],
    "mutual_information": [case(), case({"eps": 1e-3})],
    "neighbours": [case(), case({"neighbours": 1, "even": 0.2}), case({"seed": 3})],
    "ordinal": [case(), case({"beta": 1.0})],
    "orthonormal_code": [case({"vocab": 8}), case({"vocab": 5, "rms": 0.5})],
    "orthogonal": [case({"kind": k}) for k in ("householder", "cayley", "matrix_exp")],
    "permute": [case({"pattern": "b l d -> b d l"})],
    "plu": [case(), case({}, "attend")],
    "polynomial": [case(), case({"power": 0.5})],
    "power": [case(), case({"gamma": 0.0}), case({"gamma": -1.0, "frequencies": [5, 1, 100]})],
    "rates": [case({"table": RING}), case({"table": [[0, 2], [1, 0]]})],
    "projection": [case({"width": 5}), case({"width": 5, "hidden": 3})],
    "reversible_heun": [case()],
    "reverse": [case(), case({}, "attend")],
    "rms_norm": [case({"affine": a}) for a in ("none", "weight")],
    "roll": [case({"by": 2}), case({"by": -1}, "attend")],
    "rotary": [case({"dim": 8}, "x"), case({"dim": 8}, "x", "places"), case({"dim": 8}, "tokens")],
    "rotary_mix": [case(), case({}, "angles")],
    "scale": [case({"by": 2.0}), case({"by": 0.0})],
    "score_head": [case(), case({"scale": "none", "bias": "none", "init": "normal"}), case({}, "table")],
    "short_conv": [case(), case({"width": 5}, "attend")],
    "shuffle": [case(), case({"seed": 5})],
    "sigma_embedding": [case()],
    "sinusoidal_positions": [case(), case(d=7)],
    "spline": [case(), case({"bins": 3, "bound": 1.5}, "attend")],
    "spindle": [case(), case({"strength": 1.0})],
    "split": [case({"sizes": [3, 5]})],
    "split_sequence": [case({"mode": m, "of": of}, h=3) for m in ("halves", "interleave") for of in ("values", "mask")],
    "stepwise": [
        *(case({"form": form}) for form in ("sqrt", "linear", "cosine", "trunc_cos", "trunc_lin")),
        case({"form": "sqrt", "steps": 50}),
    ],
    "steps": [
        case({"steps": 60, "beta_last": 0.4}),
        case({"steps": 40, "beta_first": 0.1, "beta_last": 2.0, "form": "nearest_rate", "rounded": True}),
        case({"form": "table", "table": [[[0.1, 0.5], [0.9, 0.5]], [[0.4, 0.4], [0.6, 0.6]]]}),
    ],
    "steps_taken": [case(), case({"steps": 1})],
    "sub": [case()],
    "substitution_head": [case()],
    "take_noised": [case()],
    "timestep_embedding": [case(), case({"frequencies": 8, "hidden": 5})],
    "token_counts": [
        case({"counts": [[5, 1, 0], [1, 1, 1]], "label": 1}),
        case({"counts": [[5, 1, 0], [1, 1, 1], [0, 9, 2]], "label": 2, "prior": [1, 2, 3], "smoothing": 0.1}),
    ],
    "token_embedding": [case({"vocab": 7}), case({"vocab": 7, "init": "kaiming"})],
    "transformers_backbone": [
        case({"config": {"model_type": kind, **BACKBONE, **more}}, *ports)
        for kind, more in (("llama", {"num_key_value_heads": 2}), ("bert", {}), ("modernbert", {"pad_token_id": 0}))
        for ports in ((), ("c", "attend"))
    ],
    "uniform": [case()],
    "unigram": [case(), case({"frequencies": [7, 0, 1, 4, 90]})],
    "x0_head": [
        case(),
        case({"mask": "none", "init": "normal"}),
        case({"mask": "hidden"}),
        case({"bias": "none"}, "table"),
    ],
}
"""Cases of every built-in component except objectives and samplers, which are proved in combinations."""

EDITS = {
    *("delete", "indel", "edit_flow", "mask_delete"),
    *("dise", "dice", "edit_flow_loss", "flexmdm"),
    *("string_tau", "string_thinning", "string_first_hitting", "flexmdm_tau", "flexmdm_thinning"),
}
"""Components of string processes, which test_birth_death.py, test_edit_flow.py and test_flexmdm.py in tests/verify prove."""
REGISTRY = discover()
OWN = {entry.name: entry for entry in REGISTRY if entry.distribution.replace("-", "_").startswith("sedd_graph ")}


@pytest.mark.parametrize("name", OWN)
def test_every_built_in_component(name: str) -> None:
    """A registered component without a case fails."""
    cls = REGISTRY.component(OWN[name].op)
    if KINDS[cls.kind].place.split(".")[0] in ("data", "train"):
        return  # tests/testing/test_kinds.py
    if cls.kind.startswith("string_"):
        assert name in EDITS
        return
    if cls.kind in ("objective", "sampler"):
        assert any(name in combination for combination in SOUND)
        return
    if name == "transformers_backbone":
        pytest.importorskip("transformers", reason="the extra 'hub' is not installed")
    assert name in CASES, f"{name} is registered, but has no case in {__file__}"
    # the full proof of vectors takes long: test_the_full_proof_of_vectors below
    proof: Proof = "quick" if cls.kind.startswith("vector_") else "full"
    for config, connected, axes in CASES[name]:
        check_component(cls, config, connected=connected, axes=axes, proof=proof)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in OWN if REGISTRY.component(OWN[n].op).kind.startswith("vector_")])
def test_the_full_proof_of_vectors(name: str) -> None:
    for config, connected, axes in CASES[name]:
        check_component(REGISTRY.component(OWN[name].op), config, connected=connected, axes=axes)


def test_every_case_is_of_a_registered_component() -> None:
    assert set(CASES) <= set(OWN)


def plan(kernel: str, output: str, objective: str, sampler: str, **keys: str) -> ProcessPlan:
    """``keys``: of the sampler."""

    def part(op: str, **more: str) -> Part:
        contract = REGISTRY.contract(op)
        return Part(contract, contract.config.model_validate(getattr(REGISTRY.component(op), "example", {}) | more))

    cls, noise = REGISTRY.component(kernel), part(kernel)
    own = cls.own_schedule(noise.config)
    schedule = part("loglinear" if cls.clamp_safe else "geometric")
    if own is not None:
        contract = REGISTRY.contract(own["op"])
        schedule = Part(contract, contract.config.model_validate({"steps": own["steps"]}))
    return token_plan(noise, schedule, part(objective), part(sampler, **keys), 4, output)


def combinations() -> tuple[list[tuple[str, str, str, str]], list[tuple[str, str, str, str]]]:
    """Return the combinations of kernel, output, objective and sampler that build, and those that are refused."""
    kinds = {
        kind: [n for n in OWN if REGISTRY.component(n).kind == kind] for kind in ("kernel", "objective", "sampler")
    }
    sound: list[tuple[str, str, str, str]] = []
    refused: list[tuple[str, str, str, str]] = []
    for found in itertools.product(kinds["kernel"], ("log_score", "log_x0"), kinds["objective"], kinds["sampler"]):
        try:
            make_parts(plan(*found), REGISTRY)
            sound.append(found)
        except BlueprintError:
            refused.append(found)
    return sound, refused


SOUND, REFUSED = combinations()


def each(*places: int) -> list[tuple[str, str, str, str]]:
    """Return one sound combination for each choice at ``places``, with block diffusion as a choice of its own."""
    found: dict[tuple[Any, ...], tuple[str, str, str, str]] = {}
    for combination in SOUND:
        kernel, output, objective, sampler = combination
        key = (*(combination[i] for i in places), objective == "block_nelbo")
        found.setdefault(key, (kernel, output, objective, sampler))
    return list(found.values())


MASKED = {"block_nelbo", "masked_count", "confidence", "entropy_bound", "first_hitting", "remdm"}
"""Objectives and samplers that need a kernel with one masking rate for all tokens."""
UNBOUNDED = {"rates", "ordinal", "neighbours"}
"""Kernels whose reverse rates have no known bound."""
BY_TOKEN = {"power", "spindle", "learned_power"}
"""Kernels with masking rates by token, which genmd4 needs; no other objective takes the learned one."""


@pytest.mark.parametrize("found", [next(f for f in SOUND if f[0] == k) for k in dict.fromkeys(f[0] for f in SOUND)], ids=lambda f: f[0])  # fmt: skip
def test_every_kernel_is_sound(found: tuple[str, str, str, str]) -> None:
    """Schedule, rates, transitions, losses and reverse steps pass their proofs."""
    assert not [check for check in prove_parts(maker(plan(*found), REGISTRY)) if check.holds is False]


@pytest.mark.parametrize("found", each(0, 1, 2), ids=lambda f: "-".join(f[:3]))
def test_every_sound_objective_is_tight(found: tuple[str, str, str, str]) -> None:
    """Verified on an enumerable toy, for each kernel, output and objective."""
    wrong = [
        check for check in prove_objective(maker(plan(*found), REGISTRY), found[1], "quick") if check.holds is False
    ]
    assert not wrong


WIDELY = {"absorb", "uniform"}, {"ancestral", "analytic"}
"""Kernels that are verified with every sampler, and samplers with every kernel and in blocks; the other pairs are slow tests."""


def samplers() -> Iterator[Any]:
    """Return one case per kernel, output and sampler, with and without blocks."""
    first = each(0, 3)
    for found in each(0, 1, 3):
        kernel, output, objective, sampler = found
        blocks = objective == "block_nelbo"
        quick = found in first and (sampler in WIDELY[1] or (kernel in WIDELY[0] and not blocks))
        name = f"{kernel}-{output}-{sampler}{'-blocks' * blocks}"
        yield pytest.param(found, id=name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("found", list(samplers()))
def test_every_sound_sampler_draws_from_the_data_distribution(found: tuple[str, str, str, str]) -> None:
    """Verified on an enumerable toy, for each kernel, output and sampler, with and without blocks."""
    wrong = [check for check in prove_sampler(maker(plan(*found), REGISTRY), found[1], "quick") if check.holds is False]
    assert not wrong


def systematic() -> Iterator[Any]:
    """Return one case per kernel in continuous time, sampler with the key ``positions``, and blocks."""
    for found in each(0, 3):
        kernel, _, objective, sampler = found
        blocks = objective == "block_nelbo"
        if "positions" in REGISTRY.contract(sampler).config.model_fields and kernel != "steps":
            quick = sampler == "ancestral" and kernel in ("absorb", "uniform", "power")
            name = f"{kernel}-{sampler}{'-blocks' * blocks}"
            yield pytest.param(found, id=name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("found", list(systematic()))
def test_every_sampler_with_systematic_positions_draws_from_the_data_distribution(
    found: tuple[str, str, str, str],
) -> None:
    make = maker(plan(*found, positions="systematic"), REGISTRY)
    assert not [check for check in prove_sampler(make, found[1], "quick") if check.holds is False]


def test_a_combination_is_refused_only_for_a_stated_reason() -> None:
    """Refused: an output that is not read, masks that the kernel lacks, unbounded rates, a learned kernel without its objective, or a kernel in steps with one that needs continuous time."""
    for found in SOUND + REFUSED:
        kernel, output, objective, sampler = found
        unread = any(output not in REGISTRY.component(name).reads for name in (objective, sampler))
        unmasked = kernel != "absorb" and bool({objective, sampler} & MASKED)
        unbounded = kernel in UNBOUNDED and sampler == "uniformization"
        unlearned = (kernel == "learned_power" and objective != "genmd4") or (
            objective == "genmd4" and kernel not in BY_TOKEN
        )
        continuous = kernel == "steps" and (objective, sampler) != ("d3pm", "ancestral")
        assert (found in REFUSED) == (unread or unmasked or unbounded or unlearned or continuous)


class WrongShape(Component, kind="norm"):
    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return x[..., :-1]


class Writes(Component, kind="norm"):
    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return x.mul_(2.0)


class Random(Component, kind="norm"):
    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return x + torch.rand_like(x)


class Idle(Component, kind="norm"):
    class Config(ComponentConfig):
        pass

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return x * 1.0 + 0.0 * self.unused.sum()


class Leaks(Component, kind="mixer"):
    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b l d"], attend: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b l d"]:
        return x + x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("cls", "check"),
    [(WrongShape, "shape"), (Writes, "purity"), (Random, "determinism"), (Idle, "gradient"), (Leaks, "padding")],
)
def test_broken_component_fails_its_check(cls: type[Component], check: str) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_component(cls)
    assert check in {name for name, _ in caught.value.failures}


class NotItsDraws(Likelihood, kind="likelihood"):
    class Config(ComponentConfig):
        pass

    def nats(self, z: Tensor) -> Tensor:
        return 0.5 * z.flatten(1).square().sum(1)  # without its constant: it does not integrate to one

    def draw(self, shape: Sequence[int], *, generator: torch.Generator) -> Tensor:
        return torch.randn(list(shape), generator=generator)


def test_density_and_draws_of_a_likelihood_must_agree() -> None:
    with pytest.raises(ConformanceError, match="density: 'draw' and 'nats' are not of one density"):
        check_component(NotItsDraws)
