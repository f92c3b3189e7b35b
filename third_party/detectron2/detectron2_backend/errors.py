"""The one exception of this backend."""

from __future__ import annotations


class BuildError(SystemExit):
    """The build cannot go on; the message is one line that says what is wrong and what to do.

    A `SystemExit` because installers run the backend in a process of its own and show what it prints: Python prints
    the message of an uncaught `SystemExit` alone, where any other exception would bury it under a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__("detectron2 cannot be built: " + " ".join(message.split()))

    def __str__(self) -> str:
        return str(self.code)
