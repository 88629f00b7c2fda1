"""Which layers a conversion takes."""

import pytest

from moe.convert.layers import parse_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", range(10)),
        ("3", [3]),
        ("0,2, 9", [0, 2, 9]),
        ("5-7", [5, 6, 7]),
        ("7-", [7, 8, 9]),
        ("0-:2", [0, 2, 4, 6, 8]),
        ("1-8:3", [1, 4, 7]),
        ("4,2-5,4", [2, 3, 4, 5]),
    ],
)
def test_layers(text: str, layers: list[int]) -> None:
    assert parse_layers(text, 10) == tuple(layers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10", "'10' is not within layers 0 to 9 of this model"),
        ("8-12", "'8-12' is not within layers 0 to 9"),
        ("5-3", "'5-3' is not within"),
        ("12-", "'12-' is not within"),
        ("0-9:0", "the step of '0-9:0' must be at least 1"),
        ("odd", "'odd' is none of 3, 8-11, 12- or 0-:2; or use --layers all"),
        ("", "'' is none of"),
        ("-3", "'-3' is none of"),
        ("3:2", "'3:2' is none of"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="--layers") as caught:
        parse_layers(text, 10)
    assert message in str(caught.value)
