"""Words that are added to a tokenizer: their ids, their pieces, and what an adapter records of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import UserError
from .config import Embeddings, NewToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


class _Saved(BaseModel):
    """The ``embeddings`` in the config of an adapter."""

    model_config = ConfigDict(extra="forbid")

    train: Embeddings
    first: int = Field(ge=0, lt=2**31)
    tokens: list[NewToken]

    @model_validator(mode="after")
    def _check(self) -> Self:
        texts = [new.token for new in self.tokens]
        if "" in texts or len(set(texts)) < len(texts) or not (texts or self.train == "all"):
            raise ValueError("the words must be different texts, and some must be there unless train is all")
        return self


@dataclass(frozen=True)
class Words:
    """The words that are added to a model, and which rows are trained."""

    tokens: tuple[NewToken, ...]
    """The words, in the order of their ids; none if only ``train`` is ``all``."""
    first: int
    """Id of the first word; the others follow it."""
    train: Embeddings
    """Which rows of the embedding and of the head are trained."""
    pieces: tuple[tuple[int, ...], ...] = ()
    """Ids of the pieces at whose mean each word starts; empty where values are loaded from a file."""

    @property
    def rows(self) -> int:
        """Number of rows that the model needs."""
        return self.first + len(self.tokens)

    @property
    def saved(self) -> dict[str, Any]:
        """The ``embeddings`` in the config of an adapter."""
        return {"train": self.train, "first": self.first, "tokens": [new.model_dump() for new in self.tokens]}

    @classmethod
    def of_saved(cls, saved: object, origin: str) -> Words | None:
        """Return the words in the ``embeddings`` of an adapter's config; None if there are none. Raises ``UserError``,
        which begins with ``origin``, for anything else."""
        if saved is None:
            return None
        try:
            read = _Saved.model_validate(saved, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([origin, *map(str, first["loc"])])
            raise UserError(f"{where}: {first['msg']}") from None
        return cls(tuple(read.tokens), read.first, read.train)


def add_to(tokenizer: Tokenizer, tokens: Sequence[NewToken], train: Embeddings) -> Words:
    """Add words to a tokenizer. Returns them with their ids and pieces.

    Raises:
        UserError: a word is one token already, or the tokenizer cannot make one token of it.
    """
    from transformers import AddedToken

    pieces = [tuple(tokenizer.encode(new.token, add_special_tokens=False)) for new in tokens]
    vocabulary = tokenizer.get_vocab()
    for new, ids in zip(tokens, pieces, strict=True):
        known = vocabulary.get(new.token)
        if known is None and len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            known = ids[0] if tokenizer.decode(ids) == new.token else None
        if known is not None:
            raise UserError(
                f"model.add_tokens: {new.token!r} is a token of this tokenizer already (id {known}); leave it out",
                key="model.add_tokens",
            )
    for special, run in groupby(tokens, lambda new: new.special):  # each call builds the tokenizer's search anew
        added = [AddedToken(new.token, special=special, normalized=False) for new in run]
        tokenizer.add_tokens(added, special_tokens=special)
    given = [tokenizer.convert_tokens_to_ids(new.token) for new in tokens]
    first = max([-1, *vocabulary.values()]) + 1
    for i, new in enumerate(tokens):
        if given[i] != first + i or first + i not in tokenizer.encode(new.token, add_special_tokens=False):
            raise UserError(
                f"model.add_tokens: this tokenizer cannot make one token of {new.token!r}; write it in another way",
                key="model.add_tokens",
            )
    return Words(tuple(tokens), first, train, tuple(pieces))


def with_words(tokenizer: Tokenizer, words: Words | None, origin: str) -> Tokenizer:
    """Return a tokenizer with the new words of an adapter, which are added unless it has them. Raises ``UserError`` if
    they do not get their ids."""
    missing = [new for new in words.tokens if new.token not in tokenizer.get_vocab()] if words else []
    if missing:
        add_to(tokenizer, missing, "none")
    check_tokenizer(tokenizer, words, origin)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, words: Words | None, origin: str) -> None:
    """Raise ``UserError`` if a tokenizer does not have the new words of an adapter under their ids."""
    if words is None:
        return
    vocabulary = tokenizer.get_vocab()
    for id, new in enumerate(words.tokens, words.first):
        if (found := vocabulary.get(new.token)) != id:
            raise UserError(
                f"{origin} was trained with the new word {new.token!r} as token {id}, and "
                f"this tokenizer has {'no such token' if found is None else f'it as token {found}'}: use the tokenizer "
                "that is stored with the adapter"
            )
