"""``${params.NAME}`` against OmegaConf, whose spelling it is, and what it refuses that OmegaConf would do."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sedd_graph.blueprint.interpolate import MAX_TEXT, InterpolationFault, resolve, resolve_params
from sedd_graph.errors import MAX_PROBLEMS

values = st.one_of(
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8", exclude_characters="$\\"), max_size=8),
)
PARAMS = dict.fromkeys(("a", "b", "long_name"), values)
pieces = st.one_of(
    st.sampled_from(["${params.a}", "${params.b}", "${params.long_name}"]),
    st.text(st.characters(codec="ascii", exclude_characters="${}\\", min_codepoint=32), max_size=6),
)
texts = st.lists(pieces, min_size=1, max_size=5).map("".join)


@given(st.fixed_dictionaries(PARAMS), st.lists(texts, max_size=4))
def test_it_is_what_omegaconf_makes_of_it(params: dict[str, object], data: list[str]) -> None:
    config = OmegaConf.create({"params": params, "data": data})
    container: Any = OmegaConf.to_container(config, resolve=True)
    expected = container["data"]
    found = resolve({"deep": [data]}, params)["deep"][0]
    assert found == expected
    assert [type(v) for v in found] == [type(v) for v in expected]


def test_parameters_may_refer_to_each_other_in_any_order() -> None:
    params = {"c": "${params.b}/${params.a}", "b": "${params.a}", "a": 3}
    assert resolve_params(params) == {"c": "3/3", "b": 3, "a": 3}
    assert list(resolve_params(params)) == ["c", "b", "a"]


def faults(data: object, params: dict[str, object]) -> list[tuple[tuple[str | int, ...], str]]:
    with pytest.raises(InterpolationFault) as error:
        resolve(data, params)
    return error.value.faults


def test_what_is_refused_has_its_path() -> None:
    data = {
        "x": ["${params.q}", "${oc.env:HOME}"],
        "y": "${params.${params.a}}",
        "z": "\\${params.a}",
        "ok": "${params.a}",
    }
    only = "the only interpolation is ${params.NAME}"
    assert faults(data, {"a": "b"}) == [
        (("x", 0), "unknown parameter 'q'; known: a"),
        (("x", 1), f"'${{oc.env:HOME}}': {only}"),
        (("y",), f"'${{params.${{params.a}}}}': {only}"),
        (("z",), f"'\\\\${{params.a}}': {only}"),
    ]
    assert faults({"x": "${params.a}!"}, {"a": "z" * MAX_TEXT}) == [
        (("x",), f"longer than {MAX_TEXT} characters once interpolated")
    ]
    with pytest.raises(InterpolationFault, match="form a cycle: a, b"):
        resolve_params({"a": "${params.b}", "b": "${params.a}", "c": 1})


def test_the_number_of_faults_is_limited_over_all_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = []

    def choices(name: str, options: object) -> str:
        looked_up.append(name)
        return ""

    monkeypatch.setattr("sedd_graph.blueprint.interpolate.choices", choices)
    many = "${params.q}" * (MAX_PROBLEMS + 5)
    assert len(faults([many[: 11 * 60], many, many], {"a": 1})) == MAX_PROBLEMS
    looked_up.clear()
    with pytest.raises(InterpolationFault) as error:
        resolve_params({f"p{i}": many for i in range(50)})
    assert len(error.value.faults) == MAX_PROBLEMS
    assert len(looked_up) <= 2 * MAX_PROBLEMS  # each lookup compares all names


def test_three_question_marks_must_be_given() -> None:
    with pytest.raises(InterpolationFault) as error:
        resolve_params({"a": "???", "b": "${params.a}", "c": "????"})
    assert error.value.faults == [(("a",), "must be given: params.a=VALUE on the command line")]


def test_what_a_parameter_puts_in_is_not_looked_at_again() -> None:
    assert resolve("$${params.a}", {"a": "{params.b}", "b": "secret"}) == "${params.b}"
    with pytest.raises(InterpolationFault, match="cannot make up a reference together"):
        resolve_params({"a": "{params.b}", "b": 1, "c": "$${params.a}"})
    assert resolve(["${params.a}"], {"a": r"\1 \g<0>"}) == [r"\1 \g<0>"]
