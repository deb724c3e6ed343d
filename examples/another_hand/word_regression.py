"""Find words for drawings of concepts that were never seen: by ridge regression from features to bags of words."""

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV

from another_hand.nearest import Picture, features, on_white

PENALTIES = np.logspace(-2, 1, 7)  # the one with the least error, each drawing predicted from all others, is taken


class WordRegression:
    """Predict the words of drawings.

    Args:
        drawings: by concept that training shows, its RGBA drawings.
        words: by concept, also of those that training does not show, its name and keywords.
    """

    def __init__(self, drawings: Mapping[str, Sequence[np.ndarray]], words: Mapping[str, str]) -> None:
        # Rare words weigh more, and every text has length 1.
        self.bags = TfidfVectorizer(token_pattern=r"\w+").fit(words.values())
        pictures = [on_white(drawing) for drawing in chain.from_iterable(drawings.values())]
        texts = list(chain.from_iterable([words[name]] * len(drawn) for name, drawn in drawings.items()))
        self.ridge = RidgeCV(alphas=PENALTIES).fit(np.stack(list(map(features, pictures))), self._to_bags(texts))

    def score(self, pictures: Sequence[Picture], texts: Sequence[str]) -> Float[np.ndarray, "pictures texts"]:
        """Compute the cosine of each picture's predicted words and each text's words."""
        predicted = self.ridge.predict(np.stack(list(map(features, pictures))))
        predicted /= np.linalg.norm(predicted, axis=1, keepdims=True)
        scores: Float[np.ndarray, "pictures texts"] = predicted @ self._to_bags(texts).T
        return scores

    def _to_bags(self, texts: Sequence[str]) -> Float[np.ndarray, "texts words"]:
        """Count the words of texts."""
        bags: Float[np.ndarray, "texts words"] = self.bags.transform(texts).toarray()
        return bags
