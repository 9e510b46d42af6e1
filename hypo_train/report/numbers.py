"""Numbers as people read them."""

from __future__ import annotations

import math

_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k"))


def short(value: float) -> str:
    """Four significant digits at most: 0.6931, 12.5, 98.8k, 1e-06."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    for size, suffix in _SUFFIXES:
        if abs(value) >= size:
            scale = 1e3 if suffix == "k" else size
            return f"{value / scale:.4g}{suffix}"
    return "0" if abs(value) < 1e-300 else f"{value:.4g}"


def with_error(value: float, error: float | None) -> str:
    """``12.35 ± 0.41``: no more digits than the error has a say in."""
    if error is None or not math.isfinite(error) or not math.isfinite(value) or error == 0:
        return short(value)
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{min(places, 8)}f} ± {error:.{min(places, 8)}f}"


def duration(seconds: float) -> str:
    """``3 d 4 h``, ``2 h 05 min``, ``41 s``"""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{seconds:.1f} s"
