"""Write what becomes of conversations in the chat templates of many models as the tables of docs/CHAT_TEMPLATES.md:

python tests/data/chat_table.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chat_families import CONVERSATIONS, FAMILIES, Family, real_families, tokenizer_of
from served_oracle import encoded, verify

from rasa_train.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "CHAT_TEMPLATES.md"
_MADE, _REAL = "<!-- made for the tests -->", "<!-- of the models -->"


def outcome(family: Family, name: str) -> str:
    """Return what becomes of a conversation, after it was compared with what transformers makes of it."""
    tokenizer = tokenizer_of(family)
    messages, variables = CONVERSATIONS[name]
    variables = {**variables, **family.variables}
    try:
        made = encoded(tokenizer, messages, variables)
    except UserError as error:
        words = str(error).partition("refuses this conversation: ")
        return f"refused: {(words[2] or words[0])[:60].strip()}"
    verify(tokenizer, messages, variables, made.examples)
    said = "holds" if len(made.examples) == 1 else f"holds in {len(made.examples)} examples"
    if made.counts.get("lost_thoughts"):
        said += ", without the reasoning"
    if made.counts.get("lost_calls"):
        said += ", without the calls"
    return said


def table(families: Sequence[Family], *, described: bool) -> list[str]:
    """Return the lines of a table with a row for each family."""
    first = ["what the template does", "models that do so"] if described else ["model"]
    rows = [[*first, *CONVERSATIONS], ["---"] * (len(first) + len(CONVERSATIONS))]
    for family in families:
        names = [family.name, family.models] if described else [family.name]
        rows.append([*names, *(outcome(family, name) for name in CONVERSATIONS)])
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def tables_of(text: str) -> dict[str, list[str]]:
    """Return the tables of the page, by the comments before them."""
    found = {}
    for mark in (_MADE, _REAL):
        lines = text.partition(mark)[2].lstrip("\n").splitlines()
        end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
        found[mark] = lines[:end]
    return found


def main() -> None:
    text = PAGE.read_text("utf-8")
    made = {_MADE: table(FAMILIES, described=True), _REAL: table(real_families(), described=False)}
    for mark, old in tables_of(text).items():
        if made[mark][2:]:  # without TRL there are no templates of models
            text = text.replace("\n".join([mark, "", *old]).rstrip("\n"), "\n".join([mark, "", *made[mark]]))
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
