r"""Decide whether two answers are equal: the rule of the metric ``accuracy``.

The gold answer decides what matters. Equal values are equal in every notation; two units must convert into each other,
and a missing one is forgiven; ordered pairs, sets and intervals are different things. Values are exact: only a gold
answer that is itself a decimal number allows a difference, of one millionth.

Expressions are compared at fixed points, with 40 digits. Nothing is random, so a verdict is always the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from .answer_forms import Form, braced, read

TOLERANCE = Fraction(1, 10**6)
"""Relative difference that is allowed where the gold answer is a decimal number."""
_POINTS = ("1.37", "2.61", "-0.83", "0.29", "-3.17")
"""Where expressions with variables are compared."""


def equal(gold: str, answer: str) -> bool:
    """Whether an answer equals the gold answer. Text is never evaluated. May take long: an answer may be anything."""
    return same(read(gold), read(answer))


def same(gold: Form, answer: Form) -> bool:
    """Whether a form equals the gold answer's."""
    if (gold.text, gold.kind, gold.unit) == (answer.text, answer.kind, answer.unit):
        return bool(gold.text)
    if "words" in (gold.kind, answer.kind):
        return _words(gold) == _words(answer)
    if "relation" in (gold.kind, answer.kind):
        return _same_relation(gold, answer)
    if gold.kind == answer.kind == "matrix":
        shapes = [[len(row.parts) for row in form.parts] for form in (gold, answer)]
        return (
            gold.signs == answer.signs
            and shapes[0] == shapes[1]
            and all(_in_order(a.parts, b.parts) for a, b in zip(gold.parts, answer.parts, strict=True))
        )
    if gold.kind == answer.kind == "tuple" and len(gold.parts) == len(answer.parts):
        return gold.signs == answer.signs and _in_order(gold.parts, answer.parts)
    if gold.kind == answer.kind == "interval" and gold.signs == answer.signs and _in_order(gold.parts, answer.parts):
        return True
    if {gold.kind, answer.kind} <= {"list", "set"}:
        return _same_collection(gold, answer)
    if {gold.kind, answer.kind} == {"tuple", "list"}:
        return _same_assignment(gold, answer)
    if {gold.kind, answer.kind} & {"interval", "union"}:
        return _same_set(gold, answer)
    if gold.kind == answer.kind == "value":
        return _same_value(gold, answer)
    if (total := _total(gold)) and answer.kind == "value":
        return _same_value(total, answer)
    return bool((total := _total(answer)) and gold.kind == "value" and _same_value(gold, total))


def _in_order(gold: Sequence[Form], answer: Sequence[Form]) -> bool:
    return len(gold) == len(answer) and all(same(a, b) for a, b in zip(gold, answer, strict=True))


def _same_collection(gold: Form, answer: Form) -> bool:
    """Whether two lists or sets have the same elements in any order. Values for the names of the gold answer (``a = 1,
    b = 2``) must be in its order when they come without names."""
    if "set" in (gold.kind, answer.kind):  # in which an element may be listed twice
        pairs = ((gold, answer), (answer, gold))
        return all(any(same(*((a, b) if x is gold else (b, a))) for b in y.parts) for x, y in pairs for a in x.parts)
    if len(gold.parts) != len(answer.parts):
        return False
    names = {part.parts[0].text for part in gold.parts if part.kind == "relation"}
    if len(names) > 1 and not any(part.kind == "relation" for part in answer.parts):
        return _in_order(gold.parts, answer.parts)
    left = list(answer.parts)
    for part in gold.parts:
        found = next((i for i, other in enumerate(left) if same(part, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _same_assignment(gold: Form, answer: Form) -> bool:
    """Whether one form is a tuple, as ``(3, 4)``, and the other names its elements in order, as ``x = 3, y = 4``."""
    listed = gold if gold.kind == "list" else answer
    names = [part.parts[0].text for part in listed.parts if part.kind == "relation" and part.signs == ("=",)]
    in_order = len(names) == len(listed.parts) and names == sorted(set(names)) and all(map(_is_symbol, names))
    return in_order and _in_order(gold.parts, answer.parts)


def _words(form: Form) -> str:
    """Return the text in small letters, without an article or punctuation. A single letter keeps its case."""
    bare = re.sub(r"^(?:the|an|a) (?=\w\w)|[\s\"'.()_-]", "", form.text, flags=re.IGNORECASE)
    return bare if len(bare) == 1 else bare.lower()


def _total(form: Form) -> Form | None:
    """Return the sum of quantities such as ``2 hours and 30 minutes``; None if the form is not one."""
    values = [part.number for part in form.parts]
    units = [part.unit for part in form.parts]
    if form.kind != "list" or not all(units) or len({unit.powers for unit in units}) > 1:
        return None
    if any(unit.shift for unit in units) or len({unit.factor for unit in units}) < len(units):
        return None
    total = sum((v * u.factor for v, u in zip(values, units, strict=True) if v is not None), Fraction(0))
    number = total / units[0].factor
    return None if None in values else Form("value", str(number), unit=units[0], number=number)


# Relations


def _same_relation(gold: Form, answer: Form) -> bool:
    equations = [form.kind == "relation" and set(form.signs) == {"="} for form in (gold, answer)]
    if gold.kind != "relation":
        return same(gold, answer.parts[-1]) if equations[1] else _same_set(gold, answer)
    if answer.kind != "relation":
        return same(gold.parts[-1], answer) if equations[0] and _names(gold) else _same_set(gold, answer)
    if all(equations) and _names(gold) and _names(answer):
        a, b = (form.parts[0].text for form in (gold, answer))
        if a.lower() == b.lower() or not (_is_symbol(a) and _is_symbol(b)):
            return same(gold.parts[-1], answer.parts[-1])
        return False
    turned = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
    mirrored = tuple(turned.get(sign, sign) for sign in reversed(answer.signs))
    if gold.signs == answer.signs and _in_order(gold.parts, answer.parts):
        return True
    if gold.signs == mirrored and _in_order(gold.parts, answer.parts[::-1]):
        return True
    if len(gold.signs) == len(answer.signs) == 1:
        ratio = _constant_ratio(*(f"({form.parts[0].text})-({form.parts[1].text})" for form in (gold, answer)))
        if ratio:
            there = answer.signs if ratio > 0 or gold.signs[0] in ("=", "\\ne") else mirrored
            return gold.signs == there
    return not all(equations) and _same_set(gold, answer)


def _names(equation: Form) -> bool:
    """Whether the left side only names the right side: ``x``, ``f(x)``, ``\\theta``, ``AB``, ``(x, y)``, ``2 + 3``."""
    left = equation.parts[0].text
    name = r"\\?[A-Za-z]+(_\{?\w+\}?)?('|\^\{?-1\}?)?(\([^()=]*\))?"
    if equation.parts[0].kind == "tuple":
        return all(re.fullmatch(name, part.text) for part in equation.parts[0].parts)
    return equation.parts[0].kind == "words" or bool(re.fullmatch(name, left)) or not re.search("[A-Za-z]", left)


def _is_symbol(text: str) -> bool:
    """Whether a name is a variable: ``x``, ``\\theta``. ``f(x)`` may be called ``y`` as well, and words describe."""
    return bool(re.fullmatch(r"\\[A-Za-z]+|[A-Za-z](_\{?\w+\}?)?", text))


# Sets of numbers


def _same_set(gold: Form, answer: Form) -> bool:
    """Whether two forms stand for the same set of real numbers; an inequality in one variable stands for one."""
    if not {gold.kind, answer.kind} & {"interval", "union", "relation"}:
        return False
    sets = (_set(gold), _set(answer))
    return None not in sets and bool(sets[0] == sets[1])


def _set(form: Form) -> Any:
    """Return the set of sympy; None for a form that stands for none."""
    import sympy

    if form.kind == "value" and form.text in ("\\mathbb{R}", "\\emptyset"):
        return sympy.Interval(-sympy.oo, sympy.oo) if form.text == "\\mathbb{R}" else sympy.EmptySet
    if form.kind in ("union", "list"):
        sets = [_set(part) for part in form.parts]
        return None if None in sets else sympy.Union(*sets)
    if form.kind == "relation":
        return _set_of_inequality(form)
    values = [_real(part) for part in form.parts]
    if not values or None in values:
        return None
    if form.kind == "set":
        return sympy.FiniteSet(*values)
    if form.kind == "interval" or (form.kind == "tuple" and len(values) == 2):
        opening, closing = form.signs or ("(", ")")
        return sympy.Interval(values[0], values[1], opening == "(", closing == ")")
    return None


def _real(form: Form) -> Any:
    if form.kind != "value" or form.unit:
        return None
    value = parsed(form.text)
    return value if value is not None and value.is_extended_real and not value.free_symbols else None


def _set_of_inequality(form: Form) -> Any:
    """Return the set of numbers that a chain like ``-1 < x \\le 3`` allows. The variable is one of the sides."""
    import sympy

    at = [i for i, part in enumerate(form.parts) if _is_symbol(part.text)]
    if len(at) != 1 or "=" in form.signs:
        return None
    (middle,) = at
    found = sympy.Interval(-sympy.oo, sympy.oo)
    for i, part in enumerate(form.parts):
        if i == middle:
            continue
        sign, bound = form.signs[min(i, middle)], _real(part)
        if bound is None or abs(i - middle) > 1:
            return None
        if sign == "\\ne":
            found = found - sympy.FiniteSet(bound)
            continue
        open_end = sign in "<>"
        above = (sign in ("<", "\\le")) == (i < middle)  # the bound is below the variable
        part_set = (
            sympy.Interval(bound, sympy.oo, open_end) if above else sympy.Interval(-sympy.oo, bound, False, open_end)
        )
        found = found.intersect(part_set)
    return found


# Values


def _same_value(gold: Form, answer: Form) -> bool:
    bases = [_base(form.text) for form in (gold, answer)]
    if any(bases):  # a missing base is forgiven
        digits = [base[0] if base else form.text for base, form in zip(bases, (gold, answer), strict=True)]
        return digits[0] == digits[1] and (None in bases or bases[0] == bases[1])
    if any(re.fullmatch(r"\d{1,2}:\d\d", form.text) for form in (gold, answer)):  # a time rather than a ratio
        return gold.text == answer.text and (gold.unit == answer.unit or not (gold.unit and answer.unit))
    if gold.unit.shift == "percent" or answer.unit.shift == "percent":
        return _same_share(gold, answer)
    angles = [_in_degrees(form) for form in (gold, answer)]
    if gold.unit and answer.unit and angles[0].unit.powers != angles[1].unit.powers:
        return False
    if gold.unit and answer.unit:
        gold, answer = angles
        return _same_number(gold, answer, gold.unit.factor / answer.unit.factor)
    if _same_number(gold, answer):
        return True
    # An angle without a unit is in radians if it is written with pi.
    if {gold.unit.powers, answer.unit.powers} == {(), (("angle", 1),)}:
        turned = [form if form.unit else _in_degrees(form) for form in (gold, answer)]
        return all("\\pi" in a.text or a.unit for a in (gold, answer)) and _same_number(turned[0], turned[1])
    return False


def _in_degrees(form: Form) -> Form:
    if form.unit.shift == "radians" or not form.unit:
        from .answer_units import Unit

        return Form("value", f"\\frac{{180}}{{\\pi}}({form.text})", unit=Unit((("angle", 1),)))
    return form


def _same_share(gold: Form, answer: Form) -> bool:
    """Compare where there is a percent sign. Two signs: the numbers are compared. One sign: 50% is 0.5; and a sign may
    be missing in the answer, and in a gold answer of at least 1, as in ``What percent ...? 50``."""
    if gold.unit.shift == answer.unit.shift:
        return _same_number(gold, answer)
    if gold.unit.powers or answer.unit.powers or gold.unit.shift == "radians" or answer.unit.shift == "radians":
        return False
    if gold.unit.shift:
        return _same_number(gold, answer) or _same_number(gold, answer, Fraction(1, 100))
    left_out = gold.number is not None and abs(gold.number) >= 1
    return (left_out and _same_number(gold, answer)) or _same_number(gold, answer, Fraction(100))


def _base(text: str) -> tuple[str, str] | None:
    """Return the digits and the base of a number: ``2112``, ``6`` for ``2112_6``."""
    found = re.fullmatch(r"(-?[0-9A-Z.]+)_(?:\{(\d+|[a-z]+)\}|(\d+|[a-z]+))", text)
    if not found or not re.search(r"\d|^-?[A-Z]{2}", found[1]):
        return None
    base = found[2] or found[3]
    names = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    return found[1], str(names.index(base) + 2) if base in names else base


def _same_number(gold: Form, answer: Form, factor: Fraction = Fraction(1)) -> bool:
    """Whether ``gold * factor`` equals the answer."""
    decimal = "." in gold.text and ".." not in gold.text and "overline" not in gold.text
    tolerance = TOLERANCE if decimal else Fraction(0)
    if gold.number is not None and answer.number is not None:
        return abs(gold.number * factor - answer.number) <= tolerance * abs(gold.number * factor)
    if gold.text == answer.text and factor == 1:
        return bool(gold.text)
    a, b = parsed(gold.text), parsed(answer.text)
    if a is None or b is None:
        return False
    import sympy

    return same_expression(a * sympy.Rational(factor.numerator, factor.denominator), b, float(tolerance))


def same_expression(a: Any, b: Any, tolerance: float = 0) -> bool:
    """Whether two expressions have the same variables and values. Points where either has no value, or only one is
    real, are left out; at least one point must remain."""
    if a == b:
        return bool(a.is_finite is not False or a.is_infinite)
    agree = 0
    for x, y in _values((a, b)):
        if x is None or y is None or (abs(x.imag) > 0) != (abs(y.imag) > 0):
            continue
        size = max(abs(x), abs(y))
        if abs(x - y) > size * max(1e-30, tolerance):
            return False
        agree += 1
    return agree > 0


def _constant_ratio(gold: str, answer: str) -> Any:
    """Return the number by which one expression is another at all points; None if there is none."""
    a, b = parsed(gold), parsed(answer)
    if a is None or b is None or a.free_symbols != b.free_symbols:
        return None
    ratios = [x / y for x, y in _values((a, b)) if x and y]
    if len(ratios) < 2 or any(abs(ratio - ratios[0]) > 1e-25 * abs(ratios[0]) for ratio in ratios):
        return None
    return ratios[0].real if ratios[0].imag == 0 else None


def _values(pair: tuple[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """Yield the values of two expressions at the fixed points, with 40 digits; None where there is no finite one."""
    import mpmath
    import sympy

    symbols = sorted(pair[0].free_symbols | pair[1].free_symbols, key=str)
    points = [sympy.Rational(point) for point in _POINTS]
    for i in range(len(points) if symbols else 1):
        at = {symbol: points[(i + 2 * j) % len(points)] + j for j, symbol in enumerate(symbols)}
        found = []
        for expression in pair:
            value = expression.evalf(40, subs=at)
            real, imaginary = value.as_real_imag()
            finite = real.is_Float or real.is_Integer or real.is_Rational
            exact = finite and (imaginary.is_Float or imaginary.is_Rational)
            with mpmath.workdps(40):
                number = mpmath.mpc(*map(_number, (real, imaginary))) if exact else None
                # rounding leaves traces of an imaginary part
                if number is not None and abs(number.imag) < abs(number) * mpmath.mpf("1e-35"):
                    number = mpmath.mpc(number.real, 0)
            found.append(number)
        with mpmath.workdps(40):
            yield found[0], found[1]


def _number(value: Any) -> str:
    """Return a real number for mpmath. One without a single certain digit, such as 0.e-125, is zero."""
    return "0" if value.is_Float and value._prec <= 2 else str(value)


@lru_cache(maxsize=64)
def parsed(text: str) -> Any:
    """Return the expression of sympy that LaTeX (or ``sqrt(2)/2``) stands for; None if it cannot be read. Decimal
    numbers are exact fractions, ``i`` and ``e`` are the constants, and a mixed number is a sum."""
    import sympy
    from latex2sympy2_extended import latex2sympy

    if "?" in text or not text or re.search(r"\d \d", text):
        return None
    try:
        found = latex2sympy(_plain_latex(text), is_real=None, convert_degrees=False, normalization_config=None)
        value = found.doit() if isinstance(found, sympy.Expr) else None
    except Exception:  # the parser raises anything for what it cannot read
        return None
    if value is None:
        return None
    known = {"i": sympy.I, "e": sympy.E, "pi": sympy.pi}
    # One symbol for each name: symbols of the parser are real or not, depending on the rest of the text.
    return value.xreplace({s: known.get(s.name, sympy.Symbol(s.name)) for s in value.free_symbols})


_CALLED = re.compile(
    r"(?<![A-Za-z\\])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|alpha|beta|arcsin|arccos|arctan)"
)


def _plain_latex(text: str) -> str:
    text = braced(_CALLED.sub(r"\\\1 ", text))
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\^(-?\d+(?:\.\d+)?)", r"^{\1}", text)
    text = re.sub(r"(?<![\d.}A-Za-z^_])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\\frac{\2}{\3})", text)
    text = re.sub(r"(\d*)\.(\d+)", lambda m: f"\\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)
    text = re.sub(r"\^\\circ\s*", r" \\cdot\\frac{\\pi}{180} ", text).replace("\\circ", "")
    return re.sub(r"(?<!\\)\*", r"\\cdot ", text)
