"""Quantities as people read them, the same on the screen and in the report."""

from collections.abc import Sequence


def duration(seconds: float) -> str:
    """12.3 s, 3 min 12 s, 2 h 05 min: two units at most, never more precise than anyone acts on."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def byte_count(count: float) -> str:
    """Decimal units, as networks and disks are sold: 512 B, 41.2 kB, 1.30 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{significant(count)} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{significant(count)} TB"


def significant(value: float) -> str:
    """Three significant digits without an exponent: 0.123, 1.23, 12.3, 123."""
    size = abs(value)
    return f"{value:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}" if size >= 0.9995 else f"{value:.3f}"


def counted(count: int, noun: str) -> str:
    """1 site, 3 sites."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def printable(text: str) -> str:
    """`text` on one line, with every control character replaced: a peer's words may not steer a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
