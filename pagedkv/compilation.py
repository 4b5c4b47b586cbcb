"""Whether code is being compiled, and whether it is kept: `pagedkv.jit` notes it, so that a view can say why nothing moves."""

from dataclasses import dataclass


@dataclass(slots=True)
class Compilation:
    """Compiling in this process. Code that is read from disk is not compiled and does not count."""

    num_running: int = 0
    """Compilations under way now, one within another."""
    num_begun: int = 0
    """Compilations begun so far."""
    kept: bool = True
    """Whether there is a folder that compiled code can be kept in."""

    def begin(self) -> None:
        """Note that a compilation begins."""
        self.num_running += 1
        self.num_begun += 1

    def end(self) -> None:
        """Note that one ends."""
        self.num_running -= 1


COMPILATION = Compilation()
"""That of this process."""
