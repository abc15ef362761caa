"""Examples that are equal: the same tokens and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .cache import TokenDataset

_Digests = np.ndarray
"""One digest of 16 bytes for each example; uint64, shape (examples, 2)."""


class Distinct(NamedTuple):
    """Views without duplicates, and the counts of what they had."""

    views: list[TokenDataset]
    duplicates: int
    """Examples that equal an earlier one, of any of the views; not counted unless they are dropped."""
    held_out: int
    """Examples that equal a held-out one; they are no ``duplicates``."""


def distinct(
    views: Sequence[TokenDataset], held_out: TokenDataset | None, names: Sequence[str], *, drop: bool
) -> Distinct:
    """Find the examples that equal an earlier one, in the order of the views, or a held-out one.

    Takes some 50 bytes of memory for each example.

    Args:
        views: views of training examples.
        held_out: held-out examples, if they are a set of their own.
        names: names of the views, for messages.
        drop: whether these examples are dropped; otherwise only those that equal a held-out one are counted.
    Raises:
        UserError: none would be left of a view.
    """
    if held_out is None and not drop:
        return Distinct(list(views), 0, 0)
    digests = np.concatenate([_digests(view) for view in views])
    leaked = np.zeros(len(digests), bool) if held_out is None else _among(digests, _digests(held_out))
    if not drop:
        return Distinct(list(views), 0, int(leaked.sum()))
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal examples, the first one comes first
    repeated = np.zeros(len(digests), bool)
    repeated[order[1:]] = (digests[order[1:]] == digests[order[:-1]]).all(1)
    kept = ~(repeated | leaked)
    parts = np.split(kept, np.cumsum([len(view) for view in views])[:-1])
    if empty := [name for name, part in zip(names, parts, strict=True) if not part.any()]:
        raise UserError(
            f"data.deduplicate: every example of {empty[0]} equals a held-out example (data.validation) or one of an "
            "earlier set, so none is left; name other rows, or remove this set",
            key="data.deduplicate",
        )
    left = [view if part.all() else view.select(np.nonzero(part)[0]) for view, part in zip(views, parts, strict=True)]
    return Distinct(left, int((repeated & ~leaked).sum()), int(leaked.sum()))


def notes(duplicates: int, held_out: int, *, dropped: bool) -> list[str]:
    """Return what the user should know, one line each."""
    lines = [f"{duplicates:,} training examples equal an earlier one and are dropped"] if duplicates else []
    if held_out:
        done = "are dropped" if dropped else "are trained on; data.deduplicate: true drops them"
        lines.append(f"{held_out:,} training examples are held-out examples (data.validation) too and {done}")
    return lines


def _among(digests: _Digests, known: _Digests) -> np.ndarray:
    """Return which digests are known; bool."""
    kind = [("a", np.uint64), ("b", np.uint64)]
    found: np.ndarray = np.isin(digests.view(kind).ravel(), known.view(kind).ravel())
    return found


def _digests(view: TokenDataset) -> _Digests:
    made = bytearray()
    for arrays in view.raw():
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(array.tobytes())
        made += digest.digest()
    return view.of_view(np.frombuffer(made, np.uint64).reshape(-1, 2))
