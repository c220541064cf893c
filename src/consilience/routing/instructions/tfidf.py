"""Texts as weighted words: no model, and the same numbers everywhere.

    x_t = (1 + ln tf_t) idf_t,    idf_t = ln((1 + n) / (1 + df_t)) + 1,    e = x / |x|

over words and pairs of neighbouring words t; tf_t counts t in the text, df_t the documents that have it. A document is
all that is known of one expert: a word that all experts' prompts share ("write", "the") then says little, and one that
every prompt of a single expert has says much, which counting prompts as documents gets the wrong way round.

Source: sublinear tf and smoothed idf as scikit-learn defines them.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from consilience.routing.unit import unit

_WORD = re.compile(r"\w+")


def terms(text: str) -> Counter[str]:
    """Return how often a text has each word and each pair of neighbours, after NFKC and case folding."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return Counter([*words, *(f"{one} {other}" for one, other in pairwise(words))])


@dataclass(frozen=True, eq=False)
class TfIdf:
    """Texts to unit vectors [n, V] float32; unknown terms are ignored, and a text without known ones is 0.

    Attributes:
        most: the most terms to keep, by the number of documents that have them, then by how often.
        vocabulary: the V terms.
        idf: [V].
    """

    most: int
    vocabulary: tuple[str, ...] = ()
    idf: Tensor | None = None

    @cached_property
    def _index(self) -> dict[str, int]:
        return {term: number for number, term in enumerate(self.vocabulary)}

    def fitted(self, groups: Sequence[Sequence[str]]) -> "TfIdf":
        """Return an embedder that knows the terms of these documents, each a list of texts."""
        documents = [sum((terms(text) for text in group), Counter[str]()) for group in groups]
        frequency = Counter(term for document in documents for term in document)
        total = sum(documents, Counter[str]())
        kept = sorted(frequency, key=lambda term: (-frequency[term], -total[term], term))[: self.most]
        idf = [math.log((1 + len(documents)) / (1 + frequency[term])) + 1 for term in kept]
        return TfIdf(self.most, tuple(kept), torch.tensor(idf, dtype=torch.float32))

    def remembering(self) -> "TfIdf":
        """Return itself: nothing here is dear enough to keep."""
        return self

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors [n, V] float32."""
        assert self.idf is not None
        found = torch.zeros(len(texts), len(self.vocabulary))
        for row, text in enumerate(texts):
            known = [(self._index[term], count) for term, count in terms(text).items() if term in self._index]
            if known:
                where = torch.tensor([number for number, _ in known])
                found[row, where] = torch.tensor([1 + math.log(count) for _, count in known]) * self.idf[where]
        return unit(found)

    def to_dict(self) -> dict[str, Any]:
        """Return what is fitted, in plain values."""
        return {"vocabulary": list(self.vocabulary)}

    def tensors(self) -> dict[str, Tensor]:
        """Return what is fitted, in tensors."""
        assert self.idf is not None
        return {"idf": self.idf}
