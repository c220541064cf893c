"""An expert as the global router knows it: what is said of it, and the vector of that."""

from dataclasses import dataclass

from torch import Tensor

from consilience.errors import InputError
from consilience.routing.instructions.describe import Source
from consilience.routing.instructions.embed import Embedder
from consilience.routing.unit import unit


@dataclass(frozen=True, eq=False)
class Told:
    """An expert and what was said of it; without words, its examples speak."""

    source: Source
    text: str

    @property
    def texts(self) -> tuple[str, ...]:
        """What is embedded for it.

        Raises:
            InputError: there is nothing.
        """
        if not self.text and not self.source.examples:
            raise InputError(
                f"expert {self.source.name!r}: has no examples, which describer none embeds; give it data, or choose "
                "describer template"
            )
        return (self.text,) if self.text else self.source.examples

    def vector(self, embedder: Embedder) -> Tensor:
        """Return its unit vector [E].

        Raises:
            InputError: the embedder knows nothing of what is said.
        """
        vector = unit(embedder(self.texts).mean(0))
        if not bool(vector.any()):
            raise InputError(
                f"expert {self.source.name!r}: the embedder knows nothing of what is said of it; say more, or build "
                "the instructions again with all experts"
            )
        return vector
