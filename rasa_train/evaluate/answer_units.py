r"""Units at the end (or, as a dollar sign, at the start) of a value."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Unit:
    """A unit. Values in two units compare if their ``powers`` are equal, after multiplication by their ``factor``."""

    powers: tuple[tuple[str, int], ...] = ()
    factor: Fraction = Fraction(1)
    shift: str = ""
    """``percent`` and ``radians``, which are treated apart."""

    def __bool__(self) -> bool:
        return bool(self.powers or self.shift)


NO_UNIT = Unit()
_TABLE = """
length 1 m meter metre; length 1/100 cm centimeter centimetre; length 1/1000 mm millimeter millimetre; length 1/10 dm
decimeter; length 1000 km kilometer kilometre; length 0.0254 in inch inche; length 0.3048 ft foot feet; length 0.9144 yd
yard; length 1609.344 mi mile; time 1 s sec second; time 60 min minute; time 3600 h hr hour; time 86400 day; time 604800
week; year 1 yr year; year 1/12 month; mass 1 g gm gram; mass 1/1000 mg milligram; mass 1000 kg kilogram; mass 1000000
tonne; mass 453.59237 lb pound; mass 28.349523125 oz ounce; money 1 dollar usd buck; money 1/100 cent penny pennie;
angle 1 degree deg; angle 1/60 arcminute; memory 1 byte; power 1 w watt; power 1000 kw kilowatt; am 1 am; pm 1 pm
"""
_UNITS: dict[str, tuple[dict[str, int], Fraction]] = {}
for _line in _TABLE.replace("\n", " ").split(";"):
    _dimension, _factor, *_names = _line.split()
    _UNITS |= {name: ({_dimension: 1}, Fraction(_factor)) for name in _names}
_UNITS |= {
    name: ({"length": 3}, Fraction(factor))
    for names, factor in (("l liter litre", "1/1000"), ("ml milliliter millilitre cc", "1/1000000"), ("cl", "1/100000"))
    for name in names.split()
}
_UNITS |= {"mph": ({"length": 1, "time": -1}, Fraction("1609.344") / 3600)}
_UNITS |= {name: ({"length": 1, "time": -1}, Fraction(1000, 3600)) for name in ("kph", "kmh", "kmph")}
NAMES = frozenset(name for name in _UNITS if len(name) > 1)
_LETTERS = {"m", "s", "g", "h", "l", "L"}
"""Units of one letter, which without ``\\text`` are units only after a space."""
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
_PERCENT = {"percent", "percentage", "pct"}
_RADIANS = {"radian", "rad"}
_NOTHING = {"unit", "th", "st", "nd", "rd", "of", "the", "a", "an", "more", "total", "about", "exactly"}
"""Words at the end of a value that are no unit: ``12 square units``, ``the 7th``."""


_TRIGONOMETRIC = {"\\sin", "\\cos", "\\tan", "\\cot", "\\sec", "\\csc", "sin", "cos", "tan"}


def unit_of(text: str, tokens: list[str], is_word: Callable[[str], bool]) -> tuple[str, Unit]:
    """Return a value's text without its unit, and the unit. The unit is read from the end of the tokens."""
    if text.lstrip("+- ").startswith("\\dollar"):
        bare = text.replace("\\dollar", "", 1).strip()
        rest, unit = unit_of(bare, tokens[tokens.index("\\dollar") + 1 :], is_word)
        # "$5 per hour" has another unit than "$5"; "$5 dollars" has not
        money = Unit((("money", 1),))
        return rest, money if not unit or unit.powers == money.powers else unit
    if text.endswith("%") and (bare := text.removesuffix("%").removesuffix("\\").strip()):
        return bare, Unit(shift="percent")
    at = len(tokens)
    while at > 0 and _belongs(tokens, at - 1, is_word):
        at -= 1
    while at < len(tokens) and not _begins(tokens, at, is_word):
        at += 1
    number = "".join(tokens[:at]).strip()
    if not number or at == len(tokens) or number[-1] in "+-*/^_({":
        return text, NO_UNIT
    if tokens[at] == "^" and _TRIGONOMETRIC.intersection(tokens[:at]):  # the angle of a function
        return text, NO_UNIT
    return number, _unit([token.lstrip("\ue000").lower() for token in tokens[at:] if not token.isspace()])


def _belongs(tokens: list[str], at: int, is_word: Callable[[str], bool]) -> bool:
    """Whether a token may be part of a unit that goes on to the end of the tokens."""
    token = tokens[at]
    if token.isspace() or token in "/^{}.-'" or token in ("\\circ", "\\cdot"):
        return True
    if token.isdigit():  # only as a power
        return "".join(tokens[max(at - 2, 0) : at]).strip("{- ").endswith("^")
    return _names_unit(token, is_word)


def _names_unit(token: str, is_word: Callable[[str], bool]) -> bool:
    if len(token) == 1:
        return token in _LETTERS
    return is_word(token) or singular(token) in _UNITS or token.lower() in _POWERS


def _begins(tokens: list[str], at: int, is_word: Callable[[str], bool]) -> bool:
    """Whether a unit may begin with a token."""
    token = tokens[at]
    if token == "^":
        return tokens[at + 1 : at + 2] == ["\\circ"]
    if token in _LETTERS:
        return at > 1 and tokens[at - 1].isspace() and (tokens[at - 2].isdigit() or tokens[at - 2] == "}")
    if not token.lstrip("\ue000").isalpha():
        return False
    return _names_unit(token, is_word)


def singular(word: str) -> str:
    """Return a noun without its plural ``s``, and in lower case."""
    word = word.lower()
    if word in _UNITS or len(word) < 3:
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word.removesuffix("s") if not word.endswith("ss") else word


def _unit(words: list[str]) -> Unit:
    """Return the unit that the words name: ``square inches``, ``km / h``, ``meters per second squared``, ``apples``."""
    powers: dict[str, int] = {}
    factor, sign, pending, last = Fraction(1), 1, 1, ""
    i = 0
    while i < len(words):
        word = singular(words[i])
        i += 1
        if word == "^" and words[i : i + 1] == ["\\circ"]:
            word, i = "degree", i + 1
        if word == "^":
            digits = "".join(words[i:]).lstrip("{")
            found = re.match(r"-?\d", digits)
            if found and last:
                factor *= _add(powers, last, sign * (int(found[0]) - 1))
            while i < len(words) and not words[i].isalpha() and words[i] != "/":
                i += 1
        elif word in ("/", "per"):
            sign = -1
        elif word in ("squared", "cubed") and last:
            factor *= _add(powers, last, sign * (_POWERS[word] - 1))
        elif word in _POWERS:
            pending = _POWERS[word]
        elif word in _PERCENT:
            return Unit(shift="percent")
        elif word in _RADIANS:
            return Unit(shift="radians")
        elif word.isalpha() and word not in _NOTHING:
            factor *= _add(powers, word, sign * pending)
            last, pending = word, 1
    return Unit(tuple(sorted((name, power) for name, power in powers.items() if power)), factor)


def _add(powers: dict[str, int], word: str, times: int) -> Fraction:
    """Multiply a unit by a power of another; return the factor."""
    dimensions, factor = _UNITS.get(word, ({word: 1}, Fraction(1)))
    for name, power in dimensions.items():
        powers[name] = powers.get(name, 0) + power * times
    return factor**times
