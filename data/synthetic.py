"""Synthetic sets, made from a seed alone.

MQAR, multi-query associative recall ("Zoology", https://arxiv.org/abs/2312.04927): a document is eot, then pairs of a
key and its value, then queries, which are some of the keys in another order, each followed by its answer:

    eot  k3 v1  k7 v4  k1 v1  |  k7 a4  k3 a1

A value and the answer that repeats it have different ids, so that the answers alone can be learned and evaluated
(Shards.targets). Values are drawn independently: a model that has not read them has a loss of ln(values), one that
looks keys up has 0. What is between tells how many pairs a mixer holds.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SPLITS = "train", "val"


class MQAR(NamedTuple):
    """The task's sizes. Ids: 0 is eot, then `keys` keys, `values` values, and as many answers in the same order."""

    pairs: int  # in a document
    queries: int  # of different keys
    keys: int  # to draw from, without replacement
    values: int  # to draw from, with replacement

    eot_id = 0

    @property
    def document_tokens(self) -> int:
        return 1 + 2 * self.pairs + 2 * self.queries

    @property
    def vocab_size(self) -> int:
        return 1 + self.keys + 2 * self.values

    @property
    def targets(self) -> tuple[int, int]:
        """Returns the id of the first answer, and that of the last + 1."""
        return 1 + self.keys + self.values, self.vocab_size

    def check(self, documents: int, seed: int) -> None:
        """Raises ValueError where there are no documents of these sizes."""
        if not 1 <= self.pairs <= self.keys:
            raise ValueError(f"--pairs={self.pairs} is not in 1 to --keys={self.keys}: a document's keys are different")
        if not 1 <= self.queries <= self.pairs:
            raise ValueError(f"--queries={self.queries} is not in 1 to --pairs={self.pairs}: a key is asked for once")
        if self.values < 2:
            raise ValueError(f"--values={self.values}: try 2 or more, or there is nothing to recall")
        if documents < 3 or seed < 0:
            raise ValueError(f"--documents={documents} --seed={seed}: try 3 or more documents and a seed of 0 or more")

    def documents(self, seed: int, split: str, n: int) -> Iterator[np.ndarray]:
        """Yields n documents in arrays (up to 4096, document_tokens) int64, a function of (sizes, seed, split) alone.

        Each array has a random stream of its own, so that more documents begin with the same ones. The streams of the
        splits differ; that a document comes twice is possible, but for 16 pairs of 32 keys less likely than 1e-20.
        """
        for block, start in enumerate(range(0, n, 4096)):
            rng = np.random.default_rng((seed, SPLITS.index(split), block))
            keys = rng.random((4096, self.keys)).argsort(axis=1)[:, : self.pairs]  # (4096, pairs), all different
            values = rng.integers(self.values, size=keys.shape)
            asked = rng.random(keys.shape).argsort(axis=1)[:, : self.queries]  # (4096, queries): which pairs

            eot = np.full((4096, 1), self.eot_id)
            pairs = np.stack((1 + keys, 1 + self.keys + values), axis=2)  # (4096, pairs, 2)
            queries = np.take_along_axis(pairs, asked[:, :, None], axis=1)  # (4096, queries, 2)
            queries[:, :, 1] += self.values  # an answer, where there was a value
            told = pairs.reshape(4096, -1)  # (4096, 2 * pairs)
            asked_for = queries.reshape(4096, -1)  # (4096, 2 * queries)
            documents = np.hstack((eot, told, asked_for))
            yield documents[: n - start]
