"""Knows how numbers are shown to people: bytes, seconds, factors. Knows no command."""

from __future__ import annotations


def show_bytes(count: int | float) -> str:
    """Return ``count`` bytes in decimal units: 812 B, 9.4 kB, 12.6 MB."""
    if abs(count) < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if abs(count) < 999.5 or unit == "TB":
            break
    return f"{count:.1f} {unit}" if abs(count) < 99.95 else f"{count:.0f} {unit}"


def show_factor(before: int, after: int) -> str:
    """Return how sizes compare: 9.4 times smaller, 1.1 times larger."""
    return f"{before / after:.1f} times smaller" if after <= before else f"{after / before:.1f} times larger"


def show_seconds(elapsed_s: float) -> str:
    """Return a duration: 0.31 s, 12.4 s, 3 min 05 s, 2 h 10 min."""
    if elapsed_s < 9.995:
        return f"{elapsed_s:.2f} s"
    if elapsed_s < 99.95:
        return f"{elapsed_s:.1f} s"
    minutes, seconds = divmod(round(elapsed_s), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def show_number(value: object) -> str:
    """Return a count with separators, a real number with four digits, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def show_fields(fields: dict[str, object], *, indent: str = "  ") -> str:
    """Return a line per field, names aligned; a unit in the name (``_bytes``, ``_seconds``) decides how."""
    labels = {name: name.removesuffix("_seconds").replace("_", " ") for name in fields}
    width = max(map(len, labels.values()), default=0)
    return "\n".join(f"{indent}{labels[name]:<{width}}  {_show(name, value)}" for name, value in fields.items())


def _show(name: str, value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if name.endswith("bytes"):
            return show_bytes(value)
        if name.endswith("seconds"):
            return show_seconds(value)
    return show_number(value)
