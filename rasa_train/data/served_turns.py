"""The texts that a server sees: for each turn of the assistant the prompt that asks for it, and what follows.

A server renders the messages before a turn, with the header that asks for an answer, and the model goes on from there.
Where a chat template writes earlier turns in another way than the last one (it leaves out their thoughts, or moves the
tools), no single text holds the prompts of all turns, so a conversation becomes several texts, as few as possible.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..errors import UserError
from .columns import Message, text_of

Span = tuple[int, int]  # characters [start, end)
_THOUGHT = re.compile(
    r"(?P<open><(?P<name>(?:\w+:)?(?:think|thinking|thought|reasoning))>|\[(?P<bracket>THINK)\])(?P<space>\s*)"
    r"(?P<closed>(?:</(?P=name)>|\[/THINK\])\s*)?$"
)
_SHOWN = 60  # characters of a template's text in a message


class Turn(NamedTuple):
    """A turn of the assistant that is trained: the prompt is the text before ``start``, the turn ends at ``end``, and
    ``spans`` are the characters between them that carry loss."""

    start: int
    end: int
    spans: list[Span]


class Rendered(NamedTuple):
    """A text and the turns in it, in order: an example."""

    text: str
    turns: list[Turn]


class Served(NamedTuple):
    """What becomes of a conversation.

    Args:
        texts: the examples; several where the template rewrites earlier turns, none where such a row is refused.
        counts: counts of its turns, by the names that ``served_counts.NAMES`` explains.
        refused: why the row is refused, or None.
    """

    texts: list[Rendered]
    counts: Counter[str]
    refused: str | None = None


class Template(Protocol):
    """What is asked of a chat template."""

    ends: list[str]
    """Texts of the special tokens that end a turn of the assistant, in order; none if no such token does."""

    def marks_turns(self, variables: Mapping[str, Any]) -> bool: ...

    def render(self, messages: list[Message], variables: Mapping[str, Any], where: str, **options: Any) -> str: ...

    def render_marked(
        self, messages: list[Message], variables: Mapping[str, Any], where: str
    ) -> tuple[str, list[Span]]: ...


class _Chain:
    """A text under way: each prompt in it begins with all that stands before."""

    def __init__(self, text: str, turn: Turn, message: int, as_written: bool) -> None:
        self.text, self.turns, self.messages, self.as_written = text, [turn], [message], as_written

    def kept(self, end: str) -> int:
        """Return the place behind the token that ends the last turn: what follows it, no server sees."""
        start = self.turns[-1].start
        at = self.text.rfind(end, start) if end else -1
        return len(self.text) if at < 0 else at + len(end)

    def leads_to(self, prompt: str, end: str) -> int:
        """Return how many characters of this text the prompt begins with, 0 if it does not go on from the last turn."""
        if prompt.startswith(self.text):
            return len(self.text)
        kept = self.kept(end)
        return kept if prompt.startswith(self.text[:kept]) else 0

    def cut(self, length: int) -> None:
        last = self.turns[-1]
        self.turns[-1] = Turn(last.start, length, [(last.start, length)])


class Conversation:
    """One conversation and the template that writes it.

    Args:
        template: the chat template.
        messages: as ``Columns.extract`` returns them. A message with ``trained: False`` is context only.
        variables: what the row gives to the template beside.
        where: place of the row, for messages.
    """

    def __init__(self, template: Template, messages: list[Message], variables: Mapping[str, Any], where: str) -> None:
        self._template, self._messages, self._variables, self._where = template, messages, variables, where
        self._end = template.ends[0] if template.ends else ""
        self._counts = Counter[str]()

    def everything(self) -> Served:
        """Return the text as one example in which all is trained but the turns that the row excludes.

        Raises:
            UserError: the template refuses the conversation, or rewrites a turn that is excluded.
        """
        text = self._render(len(self._messages))
        at, spans = 0, list[Span]()
        for i, message in enumerate(self._messages):
            if message.get("trained", True):
                continue
            before = self._prompt(i) or ""
            upto = self._render(i + 1)
            if not (upto.startswith(before) and text.startswith(upto)):
                raise UserError(
                    f"{self._where}: message {i} is not to be trained on, but the tokenizer's chat template changes "
                    "it afterwards, so that it cannot be told apart; set data.supervise: response",
                    key="data.supervise",
                )
            spans.append((at, len(before)))
            at = len(upto)
        spans.append((at, len(text)))
        turn = Turn(0, len(text), [span for span in spans if span[0] < span[1]])
        return Served([Rendered(text, [turn])], self._counts)

    def split(self, *, refuse: bool) -> Served:
        """Return the texts whose prompts are those that a server sees.

        Args:
            refuse: whether a conversation that needs several texts is refused.
        Raises:
            UserError: the template refuses the conversation, or a turn does not begin with the header that asks for it.
        """
        chains: list[_Chain] = []
        for i, message in enumerate(self._messages):
            if message["role"] != "assistant" or not message.get("trained", True):
                continue
            prompt = self._prompt(i)
            if prompt is None:
                self._counts["unasked_turns"] += 1
                continue
            written = self._render(i + 1)
            text = self._begun(prompt, written, i)
            self._look_for_all(message, text[len(prompt) :])
            turn = Turn(len(prompt), len(text), [(len(prompt), len(text))])
            kept, chain = self._longest(chains, prompt)
            if chain is None:
                chains.append(_Chain(text, turn, i, text == written))
                if refuse and len(chains) > 1:
                    return Served([], self._counts, self._refusal(chains[-2], prompt, i))
                continue
            chain.cut(kept)
            chain.text = text
            chain.messages.append(i)
            chain.as_written &= text == written
            chain.turns.append(turn)
        texts = [self._marked(chain) for chain in chains]
        if not chains or chains[-1].messages[-1] < len(self._messages) - 1:
            texts = self._with_the_rest(texts, self._render(len(self._messages)), chains)
        return Served(texts, self._counts)

    def _longest(self, chains: Sequence[_Chain], prompt: str) -> tuple[int, _Chain | None]:
        """Return the chain that goes on with this prompt, of several the longest, and how much of its text it keeps."""
        found: tuple[int, _Chain | None] = (0, None)
        for chain in reversed(chains):
            kept = chain.leads_to(prompt, self._end)
            if kept > found[0]:
                found = kept, chain
        return found

    def _render(self, count: int) -> str:
        return self._template.render(self._messages[:count], self._variables, self._where)

    def _prompt(self, i: int) -> str | None:
        """Return the prompt that asks for message ``i``, or None if nothing asks for it: it greets."""
        before = self._messages[:i]
        if not before:
            return None
        try:
            return self._template.render(before, self._variables, self._where, add_generation_prompt=True)
        except UserError:
            if all(message["role"] in ("system", "developer", "assistant") for message in before):
                return None
            raise

    def _begun(self, prompt: str, written: str, i: int) -> str:
        """Return the text up to the end of message ``i``, which begins with the prompt.

        The prompt of a reasoning model may open a thought that the template leaves out of the turn, or close an empty
        one that the turn does not have. The model goes on from the prompt, so the thought of the row follows it, or
        the turn without any.
        """
        if written.startswith(prompt):
            return written
        found = _THOUGHT.search(prompt)
        for header in (prompt[: found.start()], prompt[: found.start()].rstrip()) if found else ():
            if found and written.startswith(header):
                self._counts["thought_turns"] += 1
                return prompt + _after_thought(found, written[len(header) :], self._messages[i])
        if (rest := self._behind_the_question(prompt, written, i)) is not None:
            self._counts["moved_turns"] += 1
            return prompt + rest
        at = _shared(prompt, written)
        raise UserError(
            f"{self._where}: the tokenizer's chat template changes earlier turns around message {i}: the prompt that "
            f"asks for it goes on with {prompt[at : at + _SHOWN]!r}, the conversation with "
            f"{written[at : at + _SHOWN]!r}, so the tokens could not be those that are served. Correct the template, "
            "give the message the key `train: false`, or set data.supervise: all",
            key="data.template",
        )

    def _behind_the_question(self, prompt: str, written: str, i: int) -> str | None:
        """Return what the template writes behind the message before ``i`` and the header, or None if they are not in
        both texts. Some templates write the system's message or the tools into the last message, if it is a question.
        """
        content = text_of(self._messages[i - 1].get("content"))
        content = content.strip() if isinstance(content, str) else ""
        at = prompt.rfind(content) if content else -1
        tail = prompt[at:]
        return written.rpartition(tail)[2] if at >= 0 and tail in written else None

    def _look_for_all(self, message: Message, answer: str) -> None:
        """Count what the row has and the template does not write."""
        thought, calls = message.get("reasoning_content"), message.get("tool_calls")
        if isinstance(thought, str) and thought.strip() not in answer:
            self._counts["lost_thoughts"] += 1
        functions = [
            call.get("function", call)
            for call in (calls if isinstance(calls, list) else ())
            if isinstance(call, Mapping)
        ]
        names = [str(function.get("name", "")) for function in functions if isinstance(function, Mapping)]
        if not all(name in answer for name in names):
            self._counts["lost_calls"] += 1

    def _refusal(self, chain: _Chain, prompt: str, i: int) -> str:
        at = _shared(chain.text[: chain.kept(self._end)], prompt)
        return (
            f"{self._where}: before message {i} the tokenizer's chat template writes "
            f"{prompt[at : at + _SHOWN]!r} where message {chain.messages[-1]} was trained after "
            f"{chain.text[at : at + _SHOWN]!r}"
        )

    def _marked(self, chain: _Chain) -> Rendered:
        """Return the chain; where the template marks what the assistant writes, only that is trained. The marks of a
        turn are extended to the end of its prompt, if there is a header that asks for an answer, and to the token that
        ends it: a server leaves both to the model."""
        if not self._template.marks_turns(self._variables):
            return Rendered(chain.text, chain.turns)
        messages = self._messages[: chain.messages[-1] + 1]
        text, marks = self._template.render_marked(messages, self._variables, self._where)
        if not chain.as_written or text != chain.text:
            return Rendered(chain.text, chain.turns)
        turns = []
        for i, (start, end, _) in zip(chain.messages, chain.turns, strict=True):
            spans = [(max(a, start), min(b, end)) for a, b in marks if max(a, start) < min(b, end)]
            if spans:
                before = [*spans]
                if spans[0][0] > start and self._render(i) != text[:start]:
                    spans[0] = (start, spans[0][1])
                self._counts["unprompted_turns"] += int(spans[0][0] > start)
                for token in self._template.ends:
                    if (at := text.rfind(token, start, end)) >= spans[-1][1]:
                        spans.append((at, at + len(token)))
                self._counts["marked_turns"] += int(spans != before)
            turns.append(Turn(start, end, spans))
        return Rendered(text, turns)

    def _with_the_rest(self, texts: list[Rendered], whole: str, chains: Sequence[_Chain]) -> list[Rendered]:
        """Return the texts with the messages behind the last turn, which carry no loss."""
        if not texts:
            return [Rendered(whole, [])]
        kept = chains[-1].leads_to(whole, self._end)
        if not kept:
            return texts
        turns = list(texts[-1].turns)
        start, _, spans = turns[-1]
        turns[-1] = Turn(start, kept, [(a, min(b, kept)) for a, b in spans if a < kept])
        return [*texts[:-1], Rendered(whole, turns)]


def _shared(a: str, b: str) -> int:
    """Return how many characters two texts begin with in common."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _after_thought(found: re.Match[str], turn: str, message: Message) -> str:
    """Return what follows a prompt that ends with a thought, opened or empty: the message's thought, and the turn.

    Args:
        found: the end of the prompt, as ``_THOUGHT`` finds it.
        turn: what the template writes for the message, behind the header that it shares with the prompt.
        message: the message.
    """
    opened, space = found["open"], found["space"]
    closing = f"</{found['name']}>" if found["name"] else "[/THINK]"
    own = re.match(rf"\s*{re.escape(opened)}(.*?){re.escape(closing)}\s*", turn, re.DOTALL)
    rest = turn[own.end() :] if own else turn
    if found["closed"]:
        return rest.lstrip("\n")
    if own and turn[own.end(1) :].startswith(closing):
        return f"{own[1].strip()}{space}{turn[own.end(1) :]}"
    begun = f"{_thought_of(message, opened, closing).strip()}{space}"
    return begun + (rest if rest.startswith(closing) else f"{closing}{2 * space}" + rest.lstrip("\n"))


def _thought_of(message: Message, opened: str, closing: str) -> str:
    given = message.get("reasoning_content")
    if isinstance(given, str) and given.strip():
        return given
    content = text_of(message.get("content"))
    head, found, _ = content.partition(closing) if isinstance(content, str) else ("", "", "")
    return head.strip().removeprefix(opened) if found else ""
