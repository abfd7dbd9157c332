"""What every long work says in the same way: plain lines, and the time that is left."""

from rich.console import Console


def say(console: Console, line: str) -> None:
    """One line as it is: no colours, no markup, not wrapped."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
