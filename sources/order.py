"""Which pair comes when, and in which shape: functions of seed and number of the pair n, n >= 0.

    Shuffled    each epoch all rows in a new order, in one shape
    Bucketed    the same in blocks of N pairs of one shape, where pictures keep their ratio
    Windowed    those of a few row groups at a time, in one shape

All have row(n), tries(n), its row and those that take its place while they are broken, and
shape(n), (height, width) in pixels. They know how many rows there are and of which shape, nothing
of training, of ranks and of micro-batches: so they lie beside the readers, below data.py.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

# With those of data.py, the random streams of one seed.
ORDER, REPLACE, BLOCKS, WINDOWS = 0, 2, 4, 5
OWN_TRIES = 50  # in a bucket, before others are cropped to its shape: hardly any of it is whole


class Deck:
    """Rows without end: an epoch is all of them, in an order drawn from (seed, epoch, key)."""

    def __init__(self, rows: Sequence[int], seed: int, *key: int):
        self.rows, self.seed, self.key = rows, seed, key
        self._epoch = self._order = None

    def tries(self, place: int) -> Iterator[int]:
        """The row at a place, then those that take its place while they are broken.

        On its k-th try the rows of an epoch are mapped one to one to others, by i -> a i + b mod N
        with a and b drawn from (seed, epoch, k): so none takes the place of two, and over epochs
        all are seen alike. (The next rows in order would be those behind broken ones.)"""
        size = len(self.rows)
        epoch, place = divmod(place, size)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, ORDER, epoch, *self.key])
            self._epoch, self._order = epoch, rng.permutation(size)
        own = int(self._order[place])
        yield int(self.rows[own])
        for k in itertools.count(1):
            rng = np.random.default_rng([self.seed, REPLACE, epoch, k, *self.key])
            while math.gcd(a := int(rng.integers(1, size + 1)), size) > 1:
                pass
            yield int(self.rows[(a * own + int(rng.integers(size))) % size])


class Shuffled:
    """Rows 0 ... size - 1 in one shape."""

    def __init__(self, size: int, seed: int, shape: tuple[int, int]):
        self.deck, self._shape = Deck(range(size), seed), shape

    def row(self, n: int) -> int:
        """Entry n mod N of the permutation that (seed, n div N) gives."""
        return next(self.tries(n))

    def tries(self, n: int) -> Iterator[int]:
        return self.deck.tries(n)

    def shape(self, n: int) -> tuple[int, int]:
        return self._shape


class Bucketed:
    """members: {shape: its rows}, each row once; of several, each has at least `block` of them.

    Pairs i * block ... (i + 1) * block - 1 are block i, of one shape. An epoch is as few blocks as
    hold all pairs, in an order drawn from (seed, epoch). A bucket's blocks deal its rows from a
    deck of its own, which goes on where the block before it ended: a block may cross the end of
    the deck, and no row is left over. After any number of blocks two rows of one bucket differ by
    one in how often they were seen; after e epochs a bucket has had e times its share of the
    blocks, rounded up or down, so two rows of any buckets differ by three at most."""

    def __init__(self, members: dict[tuple[int, int], np.ndarray], block: int, seed: int):
        self.shapes, self.block, self.seed = list(members), block, seed
        self.decks = [Deck(rows, seed, i) for i, rows in enumerate(members.values(), start=1)]
        self.ends = list(itertools.accumulate(map(len, members.values()), initial=0))
        self.all = Deck(range(self.ends[-1]), seed, len(self.decks) + 1)
        self.blocks = -(-self.ends[-1] // block)  # of an epoch
        self._epoch = self._blocks = None

    def row(self, n: int) -> int:
        return next(self.tries(n))

    def tries(self, n: int) -> Iterator[int]:
        """Rows of n's bucket, as of a deck; where OWN_TRIES are broken, of all buckets."""
        bucket, place = self._find(n)
        own = itertools.islice(self.decks[bucket].tries(place), OWN_TRIES)
        return itertools.chain(own, self.all.tries(n))

    def shape(self, n: int) -> tuple[int, int]:
        return self.shapes[self._find(n)[0]]

    def shares(self) -> dict[tuple[int, int], float]:
        """Of the rows, by shape."""
        parts = zip(self.shapes, self.decks, strict=True)
        return {shape: len(deck.rows) / len(self.all.rows) for shape, deck in parts}

    def _find(self, n: int) -> tuple[int, int]:
        """(bucket, place in its deck)."""
        block, inside = divmod(n, self.block)
        epoch, at = divmod(block, self.blocks)
        if epoch != self._epoch:
            before, after = self._blocks_before(epoch), self._blocks_before(epoch + 1)
            counters = [itertools.count(first) for first in before]
            each = np.repeat(np.arange(len(before)), np.subtract(after, before))
            each = np.random.default_rng([self.seed, BLOCKS, epoch]).permutation(each)
            self._epoch, self._blocks = epoch, [(int(i), next(counters[i])) for i in each]
        bucket, number = self._blocks[at]
        return bucket, number * self.block + inside

    def _blocks_before(self, epoch: int) -> list[int]:
        """Of each bucket, before an epoch. The boundaries between buckets are rounded, not the
        buckets, so that they add up; each grows, as its share of an epoch is a block at least."""
        size, blocks = self.ends[-1], epoch * self.blocks
        ends = [(2 * blocks * end + size) // (2 * size) for end in self.ends]
        return [b - a for a, b in itertools.pairwise(ends)]


class Windowed:
    """Rows in one shape, for files that are read a row group at a time. groups: (N,) that of each
    row.

    An epoch takes the groups in an order drawn from (seed, epoch), `window` of them at a time, and
    the rows of a window in one drawn from (seed, epoch, window). So each group is read once, and a
    batch is a random sample of a window, not of all rows."""

    def __init__(self, groups: np.ndarray, window: int, seed: int, shape: tuple[int, int]):
        order = np.argsort(groups, kind="stable")
        starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
        self.members = np.split(order, starts[1:])
        self.size, self.window, self.seed, self._shape = len(groups), window, seed, shape
        self._epoch = self._ends = self._windows = self._deck = None

    def row(self, n: int) -> int:
        return next(self.tries(n))

    def tries(self, n: int) -> Iterator[int]:
        """Rows of n's window, as of a deck."""
        epoch, place = divmod(n, self.size)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, WINDOWS, epoch])
            groups, w = rng.permutation(len(self.members)), self.window
            self._windows = [groups[i : i + w] for i in range(0, len(groups), w)]
            sizes = [sum(len(self.members[g]) for g in some) for some in self._windows]
            self._epoch, self._ends, self._deck = epoch, np.cumsum([0, *sizes]), (None, None)
        window = int(np.searchsorted(self._ends, place, side="right")) - 1
        if self._deck[0] != window:
            rows = np.concatenate([self.members[g] for g in self._windows[window]])
            self._deck = window, Deck(rows, self.seed, WINDOWS, epoch, window)
        return self._deck[1].tries(place - int(self._ends[window]))

    def shape(self, n: int) -> tuple[int, int]:
        return self._shape
