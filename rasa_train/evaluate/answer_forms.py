r"""Read an answer as text: notation that means nothing is removed, and what is left is taken apart.

``read`` returns a ``Form``: a value with its unit, words, a relation, a matrix, or a collection of forms. Nothing is
calculated here. All patterns and loops take time proportional to the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from fractions import Fraction

from .answer_units import NAMES, NO_UNIT, Unit, unit_of

DEEPEST = 12
"""Brackets within brackets that are taken apart; what is inside deeper ones is one value."""
MARK = "\ue000"
r"""Stands before each word that was inside ``\text``: such letters are never variables."""


@dataclass(frozen=True)
class Form:
    """An answer, or one part of an answer."""

    kind: str
    """``value``, ``words``, ``relation``, ``matrix``, or a collection: ``list``, ``tuple``, ``set``, ``interval``,
    ``union``."""
    text: str
    """The text without spaces, except between two digits; of a value, without its unit."""
    parts: tuple[Form, ...] = ()
    signs: tuple[str, ...] = ()
    """Signs between the sides of a relation; the two brackets of an interval; the environment of a matrix."""
    unit: Unit = field(default=NO_UNIT)
    number: Fraction | None = None
    """The value, if it is written as one number."""


_SYMBOLS = {
    "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "∕": "/", "⁄": "/", "≤": "\\le ",
    "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∪": "\\cup ", "∈": "\\in ", "∅": "\\emptyset ", "∞": "\\infty ",
    "π": "\\pi ",
    "θ": "\\theta ", "√": "\\sqrt ", "°": "^\\circ ", "±": "\\pm ", "٫": ".", "٬": ",", "％": "\\%", "ℝ": "\\mathbb{R}",
    "⟨": "\\langle ", "⟩": "\\rangle ", "’": "'", "¢": " cents", "€": "\\text{ euros }", "£": "\\text{ pounds }",
    "\u2009": "\\,", "\u202f": "\\,", "\u2003": " ", "\u200b": "", "\ufeff": "",
}  # fmt: skip
_SPACES = re.compile(r"\\(?:quad|qquad|displaystyle|textstyle|limits|bigskip)(?![A-Za-z])|(?<!\\)\\[,;: ]|~")
_GONE = re.compile(
    r"(?<!\\)\\!|\\(?:left|right|bigl?|bigr|Bigl?|Bigr|middle)(?![A-Za-z])|\\hspace\{[^{}]*\}|\\(?:rm|bf|it)\b"
)
_SYNONYMS = (
    (re.compile(r"\\[dtc]frac"), r"\\frac"), (re.compile(r"\\(?:leqslant|leq)(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq)(?![A-Za-z])"), r"\\ge "), (re.compile(r"\\(?:neq)(?![A-Za-z])"), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"), (re.compile(r"\\gt(?![A-Za-z])"), ">"), (re.compile("<="), r"\\le "),
    (re.compile(">="), r"\\ge "), (re.compile("!="), r"\\ne "), (re.compile(r"\\varnothing"), r"\\emptyset"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"), (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\lbrack(?![A-Za-z])"), "["), (re.compile(r"\\rbrack(?![A-Za-z])"), "]"),
    (re.compile(r"\\[lr]?vert(?![A-Za-z])"), "|"), (re.compile(r"\\dbinom"), r"\\binom"),
    (re.compile(r"(?<![A-Za-z\\])(?:infinity|inf)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"\*\*"), "^"), (re.compile(r"\\(?:begin|end)\{(?:[cltr]*align\*?|equation\*?)\}"), " "),
    (re.compile(r"\^\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"_(\d+)"), r"_{\1}"),
    (re.compile(r"\b([aApP])\.\s?([mM])\b\.?"), r"\1\2"), (re.compile(r"\\ldots|\\dots|\\cdots"), "..."),
)  # fmt: skip
_TEXT = re.compile(r"\\(text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|mathit|mathsf|operatorname)\s*\{")
_ROOT = re.compile(r"(?:√|(?<![A-Za-z\\])sqrt)\s*(-?\d+)")
_WORD = re.compile(r"[^\W\d_]+")
_WRAPPED = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("__", "__"), ("`", "`"),
            ("*", "*"), ('"', '"'))  # fmt: skip
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def clean(text: str) -> str:
    """Return the text without markup that does not change its meaning, in ASCII where there is a LaTeX command."""
    text = _ascii(_ROOT.sub(r"\\sqrt{\1}", text))
    for _ in range(DEEPEST):
        before = text
        text = _unwrapped(text.strip())
        if text == before:
            break
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\!,|,\\,|\\,|'|_)(?=\d{3}(?!\d))", MARK, text).replace("\\$", "\\dollar ")
    if text.count("$") % 2 and re.search(r"\$\s?\d", text):  # the price in "costs $29"
        text = text.replace("$", "\\dollar ", 1)
    text = text.replace("$", "").replace(MARK, "")
    for pattern, new in _SYNONYMS:
        text = pattern.sub(new, text)
    text = _GONE.sub("", _SPACES.sub(" ", _marked(text)))
    text = re.sub(rf"\^\{{\s*{MARK}?(?:st|nd|rd|th)\s*\}}", f" {MARK}th", text)
    text = re.sub(rf"\^\\circ\s*{MARK}?([CF])\b", rf" {MARK}degrees{MARK}\1", text)
    return " ".join(text.split()).removeprefix("\\approx ").removeprefix("= ").removeprefix("=")


_RAISED = {"⁻": "-"} | {character: str(i) for i, character in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
_LOWERED = {character: str(i) for i, character in enumerate("₀₁₂₃₄₅₆₇₈₉")}


def _ascii(text: str) -> str:
    found: list[str] = []
    for character in text:
        for sign, small in (("^", _RAISED), ("_", _LOWERED)):
            if character in small:
                start = found.pop()[:-1] if found and found[-1].startswith(sign + "{") else sign + "{"
                found.append(f"{start}{small[character]}}}")
                break
        else:
            plain = unicodedata.normalize("NFKC", character)
            if character in _SYMBOLS:
                found.append(_SYMBOLS[character])
            elif unicodedata.category(character) == "Nd":
                found.append(str(unicodedata.decimal(character)))
            elif unicodedata.category(character) == "No" and plain.count("⁄") == 1:
                found.append(" \\frac{{{}}}{{{}}} ".format(*plain.split("⁄")))
            else:
                found.append(plain)
    return "".join(found)


def _unwrapped(text: str) -> str:
    """Remove one layer of quotes, emphasis, dollar signs or a box, and the full stop at the end of a sentence."""
    text = re.sub(r"(?<!\.)(?:\.|[,;:])$", "", text).strip() if not text.endswith("..") else text
    for opening, closing in _WRAPPED:
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inner and opening not in inner:
            return inner
    if text.startswith("**") or text.endswith("**"):  # half of an emphasis that began before the answer
        return text.removeprefix("**").removesuffix("**")
    if (box := _BOX.match(text)) and closing_brace(text, box.end() - 1) == len(text) - 1:
        return text[box.end() : -1]
    return text


def closing_brace(text: str, start: int) -> int:
    """Return where the brace at ``start`` is closed; -1 if it never is."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] in "{}" and (i == 0 or text[i - 1] != "\\" or i == start):
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return i
    return -1


def _marked(text: str) -> str:
    r"""Replace ``\text{some words}`` by its words, each with a mark; letters in ``\mathbf`` and the like stay letters,
    and ``\operatorname{f}`` becomes ``\f``."""
    out: list[str] = []
    at = 0
    while found := _TEXT.search(text, at):
        out.append(text[at : found.start()])
        end = closing_brace(text, found.end() - 1)
        if end < 0:  # a brace that is never closed: the rest stays as it is
            at = found.start()
            break
        content, command = text[found.end() : end], found[1]
        if command == "operatorname":
            out.append(f"\\{content.strip()} ")
        elif command in ("mathbf", "mathit", "mathsf") or content.strip() in ("i", "e", "d", "T"):
            out.append(content)
        else:
            out.append(f" {_WORD.sub(lambda word: MARK + word[0], content)} " if content.strip() else " ")
        at = end + 1
    return "".join(out) + text[at:]


_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_COUNT = {word: i for i, word in enumerate(_ONES)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_COUNT |= {f"{ten} {one}": _COUNT[ten] + i for ten in _TENS for i, one in enumerate(_ONES[:10]) if i}
_COUNT |= {"one hundred": 100, "a hundred": 100, "hundred": 100}
_NTH = {
    "half": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "tenth": 10,
}
_NTH |= {f"{word}s": n for word, n in _NTH.items()} | {"halves": 2}
_SPOKEN = re.compile(
    rf"(?:(?P<count>{'|'.join(sorted(_COUNT, key=len, reverse=True))})\b(?! (?:hundred|thousand|million|billion)))?"
    rf"(?:(?:^| ?)(?P<nth>{'|'.join(sorted(_NTH, key=len, reverse=True))})\b)?",
    re.IGNORECASE,
)


def _digits(text: str) -> str:
    """Replace a number in words at the start of the text, up to one hundred or a simple fraction, by digits."""
    plain = re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z])", " ", text.replace(MARK, ""))
    found = _SPOKEN.match(plain)
    if not found or not found[0]:
        return text
    count = _COUNT[found["count"].lower()] if found["count"] else 1
    rest = plain[found.end() :].strip()
    if found["nth"]:
        return f"{count}/{_NTH[found['nth'].lower()]}" if not rest else text
    return f"{count} {_WORD.sub(lambda word: MARK + word[0], rest)}".strip()


_OPEN, _CLOSE = "([{", ")]}"


def split(text: str, separators: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Return the pieces between separators outside brackets, and the separators."""
    pieces, found, depth, start = [], [], 0, 0
    boundaries = {match.start(): match for match in separators.finditer(text)}
    i = 0
    while i < len(text):
        if depth == 0 and i in boundaries:
            pieces.append(text[start:i])
            found.append(boundaries[i][0].strip())
            start = i = boundaries[i].end()
            continue
        depth += (text[i] in _OPEN) - (text[i] in _CLOSE)
        i += 1
    return [*(piece.strip() for piece in pieces), text[start:].strip()], found


_COMMAS = re.compile(rf",\s*(?:{MARK}?(?:and|or)\b)?|;|\s{MARK}?(?:and|or)\s|\\(?:lor|vee)(?![A-Za-z])")
_QUANTITY = re.compile(rf"\d[\d.]*\s*{MARK}?(?:{'|'.join(sorted(NAMES, key=len, reverse=True))})s?\.?(?:\s+|$)")
_INNER = re.compile("[,;]")
_CUP = re.compile(r"\\cup(?![A-Za-z])")
_SIGNS = re.compile(r"\\(?:le|ge|ne|in|approx)(?![A-Za-z])|[=<>]")
_MATRIX = re.compile(r"\\begin\{((?:[pbvBV]|small)?matrix|array)\}(?:\{[clr|\s]*\})?")
_GROUPED = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_BRACKETS = (("\\{", "\\}"), ("\\langle", "\\rangle"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"))


def read(text: str) -> Form:
    """Return the form of an answer."""
    return _read(_digits(clean(text)), 0)


def _read(text: str, depth: int, inside: bool = False) -> Form:
    text = text.strip()
    key = tight(text)
    if depth > DEEPEST or not text:
        return Form("value", key)
    if not inside and number_of(text) is not None:
        return _value(text)
    if not inside and not text.startswith(("(", "[", "\\{")):  # in brackets a comma separates, and groups no digits
        text = _GROUPED.sub(lambda number: number[0].replace(",", ""), text)
    if (matrix := _MATRIX.match(text)) and text.endswith(f"\\end{{{matrix[1]}}}"):
        rows = text[matrix.end() : text.rindex("\\end")].strip().removesuffix("\\\\").split("\\\\")
        made = tuple(Form("list", row, _items(row.split("&"), depth + 1, True)) for row in rows)
        return Form("matrix", key, made, ("det" if matrix[1][0] in "vV" else "",))
    pieces, _ = split(text, _COMMAS)
    if len(pieces) == 1 and "".join(sums := _QUANTITY.findall(text)) == text and len(sums) > 1:
        pieces = sums  # 5 feet 3 inches
    if len(pieces) > 1 and all(pieces):
        return Form("list", key, _items(pieces, depth))
    if "\\pm" in text or "\\mp" in text:
        other = text.replace("\\pm", "-").replace("\\mp", "+")
        first = text.replace("\\pm", "+").replace("\\mp", "-")
        return Form("list", key, _items([first, other], depth))
    pieces, signs = split(text, _SIGNS)
    if signs and all(pieces):
        same = {"\\in": "=", "\\approx": "="}
        return Form("relation", key, _items(pieces, depth), tuple(same.get(sign, sign) for sign in signs))
    pieces, _ = split(text, _CUP)
    if len(pieces) > 1:
        return Form("union", key, _items(pieces, depth))
    return _bracketed(text, depth) or _value(text)


def _items(pieces: list[str], depth: int, inside: bool = False) -> tuple[Form, ...]:
    return tuple(_read(piece, depth + 1, inside) for piece in pieces)


def _bracketed(text: str, depth: int) -> Form | None:
    """Return the form of a text that is in brackets as a whole; None for any other text."""
    for opening, closing in _BRACKETS:
        if not (text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening + closing)):
            continue
        inner = text[len(opening) : -len(closing)].strip()
        levels = 0
        for character in inner:
            levels += (character in _OPEN) - (character in _CLOSE)
            if levels < 0:
                return None
        if opening == "\\{" and not inner:
            return Form("value", "\\emptyset")
        pieces, _ = split(inner, _INNER)
        if opening == "\\{":
            return Form("set", tight(text), _items(pieces, depth, True))
        if len(pieces) == 1:
            if opening == "[" and closing == "]":
                return Form("tuple", tight(text), _items(pieces, depth), ("[", "]"))
            return _read(inner, depth + 1) if opening == "(" and closing == ")" else None
        made = _items(pieces, depth, True)
        if (opening, closing) in (("(", ")"), ("\\langle", "\\rangle")):
            return Form("tuple", tight(text), made)
        return Form("interval" if len(made) == 2 else "tuple", tight(text), made, (opening, closing))
    return None


def tight(text: str) -> str:
    """Return the text without marks and without spaces, except a space between two digits."""
    return re.sub(r"(?<!\d) | (?!\d)", "", " ".join(text.replace(MARK, "").split()))


_TOKEN = re.compile(rf"{MARK}?[^\W\d_]+|\\[A-Za-z]+|\\.|\s+|\d+|.", re.DOTALL)
_MATH_WORDS = {"pi", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "theta", "alpha", "beta",
               "inf", "infinity", "frac", "arcsin", "arccos", "arctan", "lim", "max", "gcd", "lcm"}  # fmt: skip


def is_word(token: str) -> bool:
    """Whether letters are a word rather than a product of variables: they were inside ``\\text``, or there are at least
    three of them and a vowel."""
    if token.startswith(MARK) or token.lower() == "no":
        return True
    return (
        len(token) > 2
        and token.isalpha()
        and token.lower() not in _MATH_WORDS
        and bool(set(token.lower()) & set("aeiou"))
    )


def _value(text: str) -> Form:
    """Return the form of a text without commas, signs and outer brackets: words, or a value with its unit."""
    if tight(text) in ("\\mathbb{R}", "\\mathbbR"):
        return _bracketed("(-\\infty,\\infty)", DEEPEST - 1) or Form("value", text)
    tokens = _TOKEN.findall(text)
    seen = [token for token in tokens if not token.isspace() and token not in "'\""]
    spoken = any(map(is_word, seen)) and (is_word(seen[0]) or not any(map(str.isdigit, text)))
    if spoken and not any(token in "+^*/|" or token.startswith("\\") for token in seen):
        return Form("words", " ".join(text.replace(MARK, "").split()))
    text, unit = unit_of(text, tokens, is_word)
    return Form("value", tight(text), unit=unit, number=number_of(text))


_SMALL = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<mixed>{_SMALL})\s*\\frac\{{(?P<a>\d+)\}}\{{(?P<b>\d+)\}}"
    r"|(?P<mixed2>\d+)\s+(?P<a2>\d+)\s*/\s*(?P<b2>\d+)"
    rf"|\\frac\{{(?P<a3>-?{_SMALL})\}}\{{(?P<b3>-?{_SMALL})\}}|(?P<a4>{_SMALL})\s*/\s*(?P<b4>{_SMALL})"
    r"|(?P<dots>\d{1,3}(?:\.\d{3}){2,})|(?P<european>\d{1,3}(?:\.\d{3})+),(?P<cents>\d+)"
    rf"|(?P<before>{_SMALL}?)\.(?P<fixed>\d*)\\overline\{{(?P<period>\d+)\}}"
    rf"|(?P<whole>{_SMALL}(?:\.\d*)?|\.\d+)(?:\s*[eE](?P<e>[+-]?\d{{1,4}})"
    r"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*(?P<e2>[+-]?\d{1,4})\s*\}|(?P<e3>[+-]?\d{1,4})))?)"
)


def number_of(text: str) -> Fraction | None:
    """Return the value of a text that is one number: whole, decimal (also with a period), grouped by commas, spaces or
    points, in scientific notation, a fraction, or a mixed number."""
    text = re.sub(r"^([+-]?\d*\.\d*?)(\d)\2\2+\.\.\.$", r"\1\\overline{\2}", text)  # 0.333...
    found = _NUMBER.fullmatch(braced(text).strip())
    if not found:
        return None
    g = found.groupdict()

    def whole(name: str) -> int:
        return int((g[name] or "0").replace(",", "").replace(" ", ""))

    sign = -1 if g["sign"] == "-" else 1
    try:
        for top, bottom, mixed in (("a", "b", "mixed"), ("a2", "b2", "mixed2"), ("a3", "b3", ""), ("a4", "b4", "")):
            if g[top]:
                return sign * ((whole(mixed) if mixed else 0) + Fraction(whole(top), whole(bottom)))
        if g["dots"]:
            return Fraction(sign * int(g["dots"].replace(".", "")))
        if g["european"]:
            return sign * Fraction(f"{g['european'].replace('.', '')}.{g['cents']}")
        if g["period"]:
            fixed, period = g["fixed"], g["period"]
            nines = int("9" * len(period))
            tail = Fraction(int(fixed or "0") * nines + int(period), int(f"1{'0' * len(fixed)}") * nines)
            return sign * (whole("before") + tail)
        plain = Fraction(g["whole"].replace(",", "").replace(" ", "").removesuffix("."))
        return sign * plain * Fraction(f"1e{g['e'] or g['e2'] or g['e3'] or 0}")
    except (ZeroDivisionError, ValueError):
        return None


_ARGUMENTS = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d)|([a-z]))\s*(?:\{([^{}]*)\}|(\d)|([a-z]))")


def braced(text: str) -> str:
    r"""Return the text with braces around the arguments of each ``\frac`` and ``\sqrt``: ``\frac{1}{2}`` for
    ``\frac12``."""
    text = _ARGUMENTS.sub(lambda m: f"\\frac{{{m[1] or m[2] or m[3]}}}{{{m[4] or m[5] or m[6]}}}", text)
    return re.sub(r"\\sqrt\s*(\d|[a-z](?![a-z]))", r"\\sqrt{\1}", text)
