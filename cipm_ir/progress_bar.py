"""A bar on stderr for the commands that take long."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, float | None], None]]:
    """Gives the function to call with what is being done and the fraction done; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("read", total=1.0)

        def show(what: str, fraction: float | None) -> None:
            bar.update(task, description=escape(what), completed=fraction)

        yield show
