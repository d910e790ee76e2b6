"""What is closed when its `with` is left."""

import contextlib
from abc import abstractmethod


class Closing(contextlib.AbstractContextManager):
    """Base of what has a `close` that shall be called at the end, whatever happens before."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what is held."""

    def __exit__(self, *_: object) -> None:
        self.close()
