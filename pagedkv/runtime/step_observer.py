"""Who is told how a running engine's steps go: whoever has a clock."""

from typing import Protocol

from pagedkv.scheduling.step import Step


class StepObserver(Protocol):
    """Is told how steps go; the engine has no clock."""

    def launched(self, step: Step) -> None:
        """A step is decided, and about to be computed."""

    def computed(self, step: Step) -> None:
        """It is computed, and its batch says how many drafts were accepted: the scheduler does not know its tokens yet."""

    def completed(self) -> None:
        """The scheduler knows them."""

    def forked(self, parent: int, child: int) -> None:
        """`child`, new or a beam that is dropped, goes on from what `parent` has computed: told after `completed`."""
