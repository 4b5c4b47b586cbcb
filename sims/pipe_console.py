"""A terminal that tells its program when the reader of a pipe has left, where rich would end the program with status 1."""

from rich.console import Console


class PipeConsole(Console):
    """A console of rich whose closed pipe is a `BrokenPipeError`, as that of any other file."""

    def on_broken_pipe(self) -> None:
        """Hand on what was caught: `cli.main` ends quietly then.

        Raises:
            BrokenPipeError: Always.
        """
        raise BrokenPipeError
