"""What every long work prints in the same way, and the exit codes of the command line."""

from rich.console import Console

FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130
"""Exit codes: something could not be done, a mistake of the user's, Ctrl-C or SIGTERM."""


def print_line(console: Console, line: str) -> None:
    """One line as it is: no colours, no markup, not wrapped."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
