"""From rows to tokens: text templates and loss masks.

A mask is decided on characters and carried to tokens by the offsets that a fast tokenizer gives for the whole text,
so that no token boundary is forced that inference would not have.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .chat import ChatTemplate, Conversation
from .columns import Kind, Message, Variables, text_of
from .config import DataConfig
from .served_tokens import MARGIN, ServedTokens, overlaps, tokens_of
from .served_turns import Served, Span

IGNORE = -100
"""Label of a token without loss (torch's ``cross_entropy`` default)."""

_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_ENOUGH = 1 << 16  # characters that are tokenised at first
_INSTRUCTION = "### Instruction:\n"
_RESPONSE = "### Response:\n"
EncoderRow = tuple[str, Any, Variables]
"""Place of a row, its parts as ``Columns.extract`` returns them, and what it gives to the chat template beside."""


class Example(NamedTuple):
    """One training sequence: ``input_ids`` and ``labels``, int32 arrays of shape (length,).

    ``labels[i]`` is ``input_ids[i]`` where token i carries loss, else -100. They are not shifted. A text to classify
    has its answer instead, float64 of shape (values,) (``texts.Answers``), and its token types, int8 of shape
    (length,).
    """

    input_ids: np.ndarray
    labels: np.ndarray
    token_types: np.ndarray | None = None


@dataclass(frozen=True)
class Encoded:
    """Examples of a chunk of rows, in order, and the counts of examples that were dropped or truncated."""

    examples: list[Example]
    dropped_over_length: int
    dropped_unsupervised: int
    truncated: int
    counts: Mapping[str, int] = field(default_factory=dict)
    """Counts of conversations and turns, by the names of ``served_counts.NAMES``."""
    refused: str | None = None
    """Why the first row that was refused was refused, and its place."""


def targets(labels: np.ndarray) -> int:
    """Return the number of tokens that carry loss in one example: never the first, since labels are shifted by one."""
    return int(np.count_nonzero(labels[1:] != IGNORE))


def prompt_text(template: str, query: str) -> str:
    """Return the prompt for a trained model at evaluation: the training text up to the start of the response, without
    bos, which comes first, or last in the template ``separated``.

    Raises:
        ValueError: the template is ``chat``, whose text only the tokenizer knows (``apply_chat_template``).
    """
    if template == "alpaca":
        return f"{_PREAMBLE}{_INSTRUCTION}{query.strip()}\n\n{_RESPONSE}"
    if template in ("plain", "separated"):
        return query
    raise ValueError(f"no fixed prompt for template {template!r}: use tokenizer.apply_chat_template")


def plain_backend(tokenizer: Any) -> Any:
    """Return the tokenizer's Rust half, without any truncation and padding that an earlier call has set."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


class Encoder:
    """Encoder of rows of one kind with one template and mask.

    Args:
        config: template, mask and length limits.
        tokenizer: a fast Hugging Face tokenizer; None is enough for rows that are tokens already.
        kind: the kind of parts that ``Columns.extract`` returns for each row.
    Raises:
        UserError: the tokenizer is not usable: it is absent, not fast, or has no eos token or no chat template.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, kind: Kind) -> None:
        self.config = config
        self.kind = kind
        self.chat: ChatTemplate | None = None  # with it, a worker process imports transformers
        self.vocab_size = None if tokenizer is None else len(tokenizer)
        self._counts, self._refused = Counter[str](), list[str]()  # of the chunk under way
        if kind == "tokens":
            return
        if tokenizer is None:
            raise UserError(
                "text rows need a tokenizer, and the model has none: name one in model.tokenizer (rows of input_ids "
                "need none)",
                key="model.name",
            )
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} gives no character offsets, which the loss mask needs; use a "
                "tokenizer with a tokenizer.json (AutoTokenizer's default)",
                key="model.name",
            )
        self.backend = plain_backend(tokenizer)
        if config.template == "chat":
            self.chat = ChatTemplate(tokenizer)
            return
        if tokenizer.eos_token is None:
            raise UserError(
                "the tokenizer has no eos token, so a response would have no end; give `eos_token` in its "
                "tokenizer_config.json, or name another tokenizer in model.tokenizer",
                key="model.name",
            )
        self.eos: str = tokenizer.eos_token
        self.bos: str = tokenizer.bos_token or ""
        ids = self.backend.encode(f"{self.bos}a {self.eos}", add_special_tokens=False).ids
        if ids[-1] != tokenizer.eos_token_id or (self.bos and ids[0] != tokenizer.bos_token_id):
            raise UserError(
                f"the tokenizer does not read its own bos {self.bos!r} and eos {self.eos!r} as single "
                "tokens; add them to its tokenizer.json, or name another tokenizer in model.tokenizer",
                key="model.name",
            )

    def encode(self, rows: Sequence[EncoderRow]) -> Encoded:
        """Encode rows.

        Raises:
            UserError: a row cannot be encoded; the message names its place.
        """
        examples = []
        self._counts, self._refused = Counter(), []
        over = unsupervised = truncated = 0
        for example in self._examples(rows):
            if len(example.input_ids) > self.config.max_length:
                if self.config.over_length == "drop":
                    over += 1
                    continue
                truncated += 1
                example = Example(*(part[: self.config.max_length] for part in example[:2]))
            if targets(example.labels) == 0:
                unsupervised += 1
                continue
            examples.append(example)
        return Encoded(examples, over, unsupervised, truncated, dict(self._counts), next(iter(self._refused), None))

    def _examples(self, rows: Sequence[EncoderRow]) -> Iterator[Example]:
        if self.kind == "tokens":
            return (self._ready(where, *parts) for where, parts, _ in rows)
        if self.chat:
            return self._chat(rows, self.chat)
        return self._text([_pair(parts, where) if isinstance(parts, list) else parts for where, parts, _ in rows])

    # Rows that are tokens already

    def _ready(self, where: str, input_ids: list[int], labels: list[int] | None) -> Example:
        ids = _integers(input_ids, "input_ids", where)
        targets = ids if labels is None else _integers(labels, "labels", where)
        if len(targets) != len(ids):
            raise UserError(
                f"{where}: {len(ids)} input_ids but {len(targets)} labels; give one label for each token",
                key="data.dataset",
            )
        for name, values in (("input_ids", ids), ("labels", targets[targets != IGNORE])):
            self._check_range(values, name, where)
        return Example(ids, targets)

    def _check_range(self, values: np.ndarray, name: str, where: str) -> None:
        if not len(values):
            return
        limit = np.iinfo(np.int32).max if self.vocab_size is None else self.vocab_size - 1
        if values.min() < 0 or values.max() > limit:
            wrong = int(values.min() if values.min() < 0 else values.max())
            raise UserError(
                f"{where}: {name} holds {wrong}; token ids must be in [0, {limit}]: were these rows made "
                "with another tokenizer?",
                key="data.dataset",
            )

    # Query and response in a text template

    def _text(self, pairs: Sequence[tuple[str, str]]) -> Iterator[Example]:
        alpaca = self.config.template == "alpaca"
        texts, starts = [], []
        for query, response in pairs:
            prompt = prompt_text(self.config.template, query)
            if self.config.template == "separated":
                prompt, response = prompt + (self.bos or self.eos), f" {response.strip()}"
            elif not prompt.startswith(self.bos):
                prompt = self.bos + prompt
            response = response.strip() if alpaca else response
            if response.endswith(self.eos):  # the row already has an end token: one is enough
                response = response.removesuffix(self.eos).rstrip() if alpaca else response.removesuffix(self.eos)
            texts.append(f"{prompt}{response}{' ' if alpaca else ''}{self.eos}")
            starts.append(len(prompt))
        for text, start, encoding in zip(texts, starts, self._tokenise(texts), strict=True):
            ids, begins, ends = tokens_of(encoding)
            if self.config.supervise == "all":
                supervised = np.ones(len(ids), bool)
            elif self.config.supervise == "paper":
                supervised = ~overlaps(begins, ends, _question_spans(text))
            else:
                supervised = overlaps(begins, np.maximum(ends, begins + 1), [(start, len(text))])
            yield _masked(ids, supervised)

    def _tokenise(self, texts: list[str]) -> Iterator[Any]:
        """Yield the encoding of each text; of a very long text, that of a beginning which is longer than max_length
        tokens, since no more of it is kept."""
        most = self.config.max_length
        enough = max(_ENOUGH, 16 * most)
        encoded = self.backend.encode_batch([text[:enough] for text in texts], add_special_tokens=False)
        for text, encoding in zip(texts, encoded, strict=True):
            at = enough
            while at < len(text) and len(encoding) < most + MARGIN:
                at *= 2
                encoding = self.backend.encode(text[:at], add_special_tokens=False)
            yield encoding

    # Conversations in the tokenizer's chat template

    def _chat(self, rows: Sequence[EncoderRow], chat: ChatTemplate) -> Iterator[Example]:
        given: list[Conversation] = []
        for where, parts, variables in rows:
            messages = parts
            if isinstance(parts, tuple):
                messages = [{"role": "user", "content": parts[0]}, {"role": "assistant", "content": parts[1]}]
            given.append((where, messages, variables))
        tokens = ServedTokens(self.backend, lambda text: next(self._tokenise([text])), self.config.max_length)
        for (where, _, _), served in zip(given, chat.render(given, self.config), strict=True):
            made, joined = list[Example](), False
            for text in served.texts:
                examples, apart = tokens.examples(text, where)
                made += [_masked(*example) for example in examples]
                joined |= apart
            self._count(served, len(made), joined)
            yield from made

    def _count(self, served: Served, made: int, joined: bool) -> None:
        if served.refused is not None:
            self._refused.append(served.refused)
        several, unprompted = made > 1, served.counts["unprompted_turns"]
        self._counts += served.counts + Counter(
            verified_rows=int(self.config.supervise != "all" and served.refused is None and not unprompted),
            split_rows=int(several),
            split_examples=made if several else 0,
            refused_rows=int(served.refused is not None),
            joined_rows=int(joined),
        )


def _masked(ids: np.ndarray, supervised: np.ndarray) -> Example:
    return Example(ids, np.where(supervised, ids, np.int32(IGNORE)))


def _question_spans(text: str) -> list[Span]:
    """Return the spans without loss in the reference: from each instruction header to the next response header."""
    spans = []
    at = 0
    while (start := text.find(_INSTRUCTION, at)) >= 0:
        start += len(_INSTRUCTION)
        end = text.find(_RESPONSE, start)
        if end < 0:
            break
        spans.append((start, end))
        at = end + len(_RESPONSE)
    return spans


def _pair(messages: list[Message], where: str) -> tuple[str, str]:
    roles = [message["role"] for message in messages]
    contents: list[Any] = [text_of(message.get("content")) for message in messages]
    if roles != ["user", "assistant"] or not all(isinstance(content, str) for content in contents):
        raise UserError(
            f"{where}: only one user text and one assistant text fit data.template: alpaca or plain, got "
            f"roles {roles}; use data.template: chat",
            key="data.template",
        )
    return contents[0], contents[1]


def _integers(values: Any, name: str, where: str) -> np.ndarray:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UserError(f"{where}: {name} must be a list of integers", key="data.dataset")
    array = np.array(values, np.int64)
    if len(array) and (array.min() < np.iinfo(np.int32).min or array.max() > np.iinfo(np.int32).max):
        raise UserError(f"{where}: {name} holds a number that does not fit in 32 bits", key="data.dataset")
    return array.astype(np.int32)
