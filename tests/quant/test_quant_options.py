"""``--method``: what each name stands for, and what is refused."""

import pytest

from moe.quant.options import Method, QuantOptions, parse_method
from moe.quant.rounding import ROUNDERS
from moe.quant.scaling import SCALERS
from moe.quant.schemes import SCHEMES


def method(scaling: str | None, rounding: str, whole: bool = False) -> Method:
    return Method(scaling=scaling, rounding=rounding, balance=2.0 if whole else 0.0, align_router=whole)


def test_names() -> None:
    assert parse_method("rtn", "w4a4") == method(None, "rtn")
    assert parse_method("gptq", "w4a16") == method(None, "gptq")
    assert parse_method("awq", "w4a16") == method("awq", "rtn")
    assert parse_method("awq+clip", "w4a16") == method("awq", "clip")
    assert parse_method("gptq+smoothquant", "w8a8") == method("smoothquant", "gptq")
    assert parse_method("eaquant", "w3a4") == method("eaquant", "rtn", whole=True)
    assert parse_method("eaquant+gptq", "w4a16") == method("eaquant", "gptq", whole=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_parses_resolves(scheme: str) -> None:
    for scaling in (None, *SCALERS):
        for rounding in ROUNDERS:
            options = QuantOptions(scheme=scheme, scaling=scaling, rounding=rounding)
            name = rounding if scaling is None else f"{scaling}+{rounding}"
            if scaling == "smoothquant" and SCHEMES[scheme].activations is None:
                for refused in (lambda: parse_method(name, scheme), options.resolved):  # noqa: B023
                    with pytest.raises(
                        ValueError, match=f"--scheme {scheme} leaves activations .* use awq, eaquant, rtn"
                    ):
                        refused()
            else:
                assert parse_method(name, scheme).scaling == scaling
                assert options.resolved().name == scheme


@pytest.mark.parametrize(
    ("name", "scheme", "says"),
    [
        ("eaqant", "w8a8", "'eaqant' is unknown; did you mean 'eaquant'"),
        ("awq+", "w4a16", "'' is unknown"),
        ("awq+eaquant", "w4a4", "one of each"),
        ("rtn+gptq", "w4a4", "one of each"),
        ("gptq", "w5a5", "--scheme 'w5a5' is unknown"),
    ],
)
def test_refused(name: str, scheme: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_method(name, scheme)


def test_options_that_do_not_go_together() -> None:
    for options, says in (
        (QuantOptions(scheme="w4a16", scaling="awk"), "scaling='awk' is unknown; did you mean 'awq'"),
        (QuantOptions(scheme="w4a16", rounding="round"), "rounding='round' is unknown"),
        (QuantOptions(scheme="w4a16", affinity=True), "rtn looks at none; use clip or gptq"),
    ):
        with pytest.raises(ValueError, match=says):
            options.resolved()
    assert QuantOptions(scheme="w4a16", rounding="gptq", affinity=True).resolved().name == "w4a16"
