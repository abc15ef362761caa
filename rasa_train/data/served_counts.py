"""Words about the tokens that are trained on and those that a server sees."""

from collections.abc import Mapping, Sequence

NAMES = {
    "verified_rows": "conversations of which each prompt has the tokens that a server sees",
    "split_rows": "conversations that became several examples, since the template rewrites earlier turns",
    "split_examples": "examples that they became",
    "refused_rows": "such conversations that are left out (data.rewritten_history: refuse)",
    "joined_rows": "conversations with an answer that the tokenizer would join with the end of its prompt",
    "thought_turns": "turns that the template writes without the thought with which it begins their prompts",
    "moved_turns": "turns whose prompt the template writes in another way once they follow it",
    "marked_turns": "turns whose prompt or end token is not where the template's generation marks are",
    "unasked_turns": "turns that no prompt asks for, since they greet: context only",
    "unprompted_turns": "turns whose generation marks begin behind a header for which the template has no prompt",
    "lost_thoughts": "turns whose reasoning the template does not write",
    "lost_calls": "turns whose tool calls the template does not write",
}
"""Counts of conversations and turns of the assistant, and what they mean."""

CHANGED = {"split_rows", "refused_rows", "joined_rows", "thought_turns", "moved_turns", "marked_turns", "unasked_turns"}
"""Counts of conversations whose tokens or labels were others, or an error, before prompts were compared."""


def line(counts: Mapping[str, int]) -> str | None:
    """Return a line on what was verified, or None if there was nothing to verify."""
    if not (verified := counts.get("verified_rows", 0)):
        return None
    return f"the tokens before each trained turn are those that a server sees, in all {verified:,} conversations"


def notes(counts: Mapping[str, int], ends: Sequence[str] | None, refused: str | None) -> list[str]:
    """Return what the user should know about the examples that conversations became, one line each.

    Args:
        counts: by the names of ``NAMES``.
        ends: the special tokens that end a turn in the chat template; None without one.
        refused: why the first conversation that was refused was refused, with its place.
    """
    known = {name: f"{counts[name]:,}" for name in NAMES if counts.get(name)}
    said = {
        "split_rows": "the chat template rewrites earlier turns: {split_rows} conversations became {split_examples} "
        "examples, each with the prompts that a server sees (data.rewritten_history: refuse leaves such conversations "
        "out)",
        "refused_rows": "{refused_rows} conversations are left out, since the chat template rewrites earlier turns "
        f"(data.rewritten_history: refuse), the first at {refused}",
        "joined_rows": "{joined_rows} conversations have an answer that the tokenizer would join with the end of its "
        "prompt: its tokens are those behind the prompt's own, as when they are served",
        "thought_turns": "the chat template ends the prompts of {thought_turns} turns with a thought that it does not "
        "write in the turns: what follows such a prompt is trained, the thought of the row first",
        "moved_turns": "the chat template writes the prompts of {moved_turns} turns in another way once the answer "
        "follows: they are trained as they are asked for",
        "unasked_turns": "{unasked_turns} turns of the assistant come before any question, so that no prompt asks for "
        "them: they are context only",
        "unprompted_turns": "the chat template has no generation prompt, and its marks leave out the headers of "
        "{unprompted_turns} turns: a server leaves them to the model, but they are not trained on. Write them with "
        "add_generation_prompt",
        "lost_thoughts": "the chat template leaves out the reasoning of {lost_thoughts} turns: it is not trained on",
        "lost_calls": "the chat template leaves out the tool calls of {lost_calls} turns: they are not trained on",
    }
    told = [words.format(**known) for name, words in said.items() if name in known]
    if ends is not None and not ends and counts.get("verified_rows"):
        told.append(
            "the chat template ends a turn of the assistant with no special token, so nothing teaches the model where "
            "to stop"
        )
    return told
