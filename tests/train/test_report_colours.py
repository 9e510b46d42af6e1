"""The report's colours are distinct, with colour blindness too, and have enough contrast."""

import math
import re
from importlib.resources import files
from itertools import combinations

import pytest

# Linear RGB as seen without one kind of cone (Machado, Oliveira & Fernandes 2009, severity 1).
EYES = {
    "trichromat": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanope": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranope": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanope": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}
LUMINANCE = (0.2126, 0.7152, 0.0722)
TO_XYZ = ((0.4339, 0.3762, 0.1899), LUMINANCE, (0.0177, 0.1095, 0.8728))  # over the white point's
STYLE = (files("hypo_train.report") / "page.css").read_text()
LIGHT, DARK = (
    dict(re.findall(r"--(\w+): (#[0-9a-f]+)", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
)


def times(matrix, vector):
    return [math.fsum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def linear(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def seen(colour, eye):
    """Return a colour in CIELAB, where 2.3 is the smallest visible difference."""
    x, y, z = (
        max(part, 0) ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116
        for part in times(TO_XYZ, [min(max(part, 0), 1) for part in times(EYES[eye], linear(colour))])
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def contrast(one, other):
    darker, lighter = sorted(times([LUMINANCE], linear(colour))[0] for colour in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("kind", ["c", "p"], ids={"c": "runs", "p": "phases"}.get)
@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_distinct_with_colour_blindness(scheme, kind, eye):
    colours = {name: seen(value, eye) for name, value in scheme.items() if re.fullmatch(rf"{kind}\d", name)}
    assert len(colours) >= 8
    closest = min(combinations(colours, 2), key=lambda two: math.dist(*(colours[name] for name in two)))
    assert math.dist(*(colours[name] for name in closest)) > 5 * 2.3, closest


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_and_curves_meet_wcag_contrast(scheme):
    for ground in (scheme["paper"], scheme["card"]):
        for text in ("ink", "soft", "accent", "good", "bad", "open"):
            assert contrast(scheme[text], ground) >= 4.5, text
        for number in range(8):
            assert contrast(scheme[f"c{number}"], ground) >= 3, number
