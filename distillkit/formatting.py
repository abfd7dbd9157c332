"""Numbers as people read them: counts, tokens, bytes, durations. Imports neither rich nor torch."""

GIB = 2**30


def number_text(value: float | None, form: str) -> str:
    """A number by a format specification such as `.4f`; a dash where it is unknown."""
    return "-" if value is None else format(value, form)


def token_text(count: int) -> str:
    """Tokens as `config.tokens.parse_tokens` reads them, in three digits at most: `300M`, `1.5B`, `20k`, `999`."""
    size, unit = next(
        ((size, unit) for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)) if count >= 0.9995 * size), (1, "")
    )
    return f"{float(f'{count / size:.3g}'):g}{unit}"


def count_text(number: float) -> str:
    """A count in three digits: 4.62 B, 135 M, 300 k, 12."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{three_digits(number / size)} {unit}"
    return f"{number:.0f}"


def part_text(number: float, whole: float) -> str:
    """A part beside its whole: in billions as the whole, 0.89 B of 4.94 B, unless it is too small for that."""
    return f"{number / 1e9:.2f} B" if whole >= 1e9 > number >= 1e7 else count_text(number)


def byte_text(size: float) -> str:
    """Bytes as GiB, or as MiB below 0.1 GiB."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.0f} MiB"


def duration_text(seconds: float) -> str:
    """3.2 days (from two days on), 5.1 h, 12 min, 40 s."""
    for smallest, size, unit in ((2 * 86400, 86400, "days"), (3600, 3600, "h"), (60, 60, "min")):
        if seconds >= smallest:
            return f"{seconds / size:.3g} {unit}"
    return f"{max(seconds, 1):.0f} s"


def three_digits(number: float) -> str:
    """A number of 1 to 999 in three digits: 4.62, 46.2, 462."""
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:.0f}"
