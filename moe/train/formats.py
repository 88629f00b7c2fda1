"""How numbers and times are written for people: axes, headlines, progress lines."""

import math


def compact(value: float) -> str:
    """A number as short as an axis or a headline needs it: 0.0003 -> 3e-4, 1500 -> 1.5k, 2000000 -> 2M."""
    size = abs(value)
    if size >= 999.5:
        power = min(int(math.log10(size * 1.0005) // 3), 5)
        return f"{value / 1000**power:.3g}{' kMBTQ'[power]}"
    if 0 < size < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: "8.2 s", "2m 53s", "3h 05m", "2d 4h"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"
