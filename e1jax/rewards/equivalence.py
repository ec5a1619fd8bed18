r"""Is an answer equivalent to an accepted one? math-verify, between two tables of ours.

`spelling` takes typography away and `units` splits off units; then the marks that
math-verify's parser drops become symbols of their own (`_marked`), it parses and
compares, and `_agree` looks at every yes once more, since math-verify compares decimals
and small numbers absolutely.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import sympy
import sympy.core.random
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import (
    ConversionConfig,
    NormalizationConfig,
    normalize_latex,
)
from math_verify import verify
from sympy.core.function import AppliedUndef

from e1jax.rewards.spelling import Rule, apply, spell
from e1jax.rewards.units import conversion, split_unit

_DIGITS = 50  # of numbers that are compared exactly
_DECIMAL_TOLERANCE = sympy.Rational(1, 100_000)  # relative, where a side is a decimal
_POINTS = 3  # where expressions with variables are compared

_NORMALIZATION = NormalizationConfig(
    basic_latex=True,
    units=False,  # it takes `3t` for 3 tonnes
    malformed_operators=True,
    nits=True,
    boxed="none",
    equations=False,
)
# A letter of a multiple-choice answer, and the value that may stand behind it.
_CHOICE = re.compile(
    r"\\text\{ ?\(?([A-J])\)?[.:]? ?\}(?:[.:)])?\s*(.*)|\(([A-J])\)\s*(.*)|([A-J])[.:)]\s*(.*)|([A-J])()",
    re.DOTALL,
)
_BASE = re.compile(r"\(?\b([0-9][0-9A-F]*)\)?_\{\(?(\d+|\\text\{[a-z]+\})\)?\}")
_BASES = {
    name: str(i)
    for i, name in enumerate(
        [
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
        ],
        start=2,
    )
}
_CHAIN = re.compile(r"(\\[lg]e(?![a-z])|[<>])")
_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_LETTER = r"(?:\\(?:vec|hat)\{[a-zA-Z]\}|(?<![a-zA-Z\\])[a-zA-Z])"
_PRODUCT = re.compile(
    rf"{_LETTER}\s*\\(cdot|times)(?![a-z])\s*(?={_LETTER}(?![a-zA-Z]))"
)


def equivalent(answer: str, accepted: str) -> bool:
    """True if the answer is equal in value to the accepted one, and says nothing else.

    Both are LaTeX or plain text. It can take any time and memory: call it in a worker.
    """
    sympy.core.random.seed(0)  # SymPy tests some equalities at random points
    answer, accepted = spell(answer), spell(accepted)
    letter, answer = _choice(answer)
    accepted_letter, accepted = _choice(accepted)
    if letter and accepted_letter and letter != accepted_letter:
        return False
    if not answer or not accepted:
        return bool(letter) and letter == accepted_letter
    return _same_text(answer, accepted) or _same_value(answer, accepted)


def _choice(text: str) -> tuple[str, str]:
    r"""`\textbf{(D)} 21` as D and 21; no letter for an answer that has none."""
    match = _CHOICE.fullmatch(text)
    if match is None:
        return "", text
    letter, value = (part for part in match.groups() if part is not None)
    return letter, value


def _same_text(answer: str, accepted: str) -> bool:
    """The same text but for spaces, or the same words in any order of a list."""
    if _without_spaces(answer) == _without_spaces(accepted):
        return True
    return _words(answer) is not None and _words(answer) == _words(accepted)


def _without_spaces(text: str) -> str:
    """Spaces say nothing, but between two digits."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _words(text: str) -> list[str] | None:
    """The items of a list of words, sorted, without case; None for mathematics."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).casefold()
    items = [" ".join(item.split()) for item in re.split(r"[,;]|\b(?:and|or)\b", plain)]
    items = [item for item in items if item]
    if not items or not all(
        re.fullmatch(r"[^\W\d_][\w '.-]{2,}", item) for item in items
    ):
        return None
    return sorted(items)


_LEIBNIZ = re.compile(
    r"\\frac\{d(?:\^\{(\d)\})? ?([a-zA-Z])\}\{d ?[a-z](?:\^\{\d\})?\}"
)


def _same_value(answer: str, accepted: str) -> bool:
    if "'" in answer or "'" in accepted:  # dy/dt beside y'
        answer, accepted = (
            _LEIBNIZ.sub(lambda m: m[2] + "'" * int(m[1] or 1), text)
            for text in (answer, accepted)
        )
    products = [set(_PRODUCT.findall(text)) for text in (answer, accepted)]
    if all(products) and products[0] != products[1]:  # u \cdot v and u \times v
        return False
    answer, unit = split_unit(answer)
    accepted, accepted_unit = split_unit(accepted)
    factor = conversion(unit, accepted_unit)
    if factor is None:
        return False
    if unit is None and not re.search(r"[a-zA-Z]", accepted):
        answer = re.sub(r"(?<=\d) ?(?:[mgshLNJWKVAC])$", "", answer)  # 12 m for 12
    answer, accepted = _bases(answer, accepted)
    return any(
        _same_reading(one, other, factor) for one, other in _readings(answer, accepted)
    )


def _bases(answer: str, accepted: str) -> tuple[str, str]:
    """Numbers with a base as symbols where both have one.

    The answer may leave the base out; if it alone has one, it is read in that base.
    """

    def base(match: re.Match[str]) -> str:
        return _BASES.get(match[2].removeprefix(r"\text{").removesuffix("}"), match[2])

    def symbol(match: re.Match[str]) -> str:
        return _symbol(f"{match[1].lstrip('0')} base {base(match)}")

    def value(match: re.Match[str]) -> str:
        try:
            return str(int(match[1], int(base(match))))
        except ValueError:  # 5_3, or a base beyond 36
            return symbol(match)

    has_base = _BASE.search(answer), _BASE.search(accepted)
    if all(has_base):
        return _BASE.sub(symbol, answer), _BASE.sub(symbol, accepted)
    return _BASE.sub(value, answer), _BASE.sub(r"\1", accepted)


_PERCENT = re.compile(r"(?<!%)\s*\\%(?!\s*\\?%)")
_PERCENT_NUMBER = re.compile(
    r"((?:\d|\.|\\frac\{[^{}]*\}\{[^{}]*\}| (?=\\frac))+)\s*\\%(?!\s*\\?%)"
)
_EULER = re.compile(r"(?<![\w.\\{}])([2-9]\d*)e([+-]\d)(?![\d.e])")
_SCIENTIFIC = re.compile(r"(?<![\w\\])(\d+(?:\.\d*)?) ?[eE]([+-]?\d+)(?![\d.a-zA-Z])")


def _readings(answer: str, accepted: str) -> Iterator[tuple[str, str]]:
    r"""The pairs of texts to compare: one pair, but for two kinds of spelling.

    p % is the number p, or p / 100. `2e-1` is 0.2, or, against an answer with Euler's
    number in it, 2 e - 1.
    """
    sides = []
    for text, other in ((answer, accepted), (accepted, answer)):
        euler = _SCIENTIFIC.sub("", other)
        texts = [_SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)]
        if _EULER.search(text) and re.search(r"(?<![a-zA-Z\\])e(?![a-zA-Z])", euler):
            texts.append(_EULER.sub(r"\1e \2", text))
        if "%" in text and "%" not in other:
            texts += [_PERCENT_NUMBER.sub(r"\\frac{\1}{100}", t) for t in texts]
        sides.append([_PERCENT.sub("", t) for t in texts])
    return itertools.product(*sides)


def _same_reading(answer: str, accepted: str, factor: Fraction) -> bool:
    answer, accepted = _marked(answer), _marked(accepted)
    if _without_spaces(answer) == _without_spaces(accepted):
        return factor == 1
    fold = not (_has_both_cases(answer) or _has_both_cases(accepted))
    # A real variable is never equal to 1 + i.
    real = _IMAGINARY not in answer + accepted
    found, target = _parse(answer, fold, real), _parse(accepted, fold, real)
    if found is None or target is None:
        return False
    if factor != 1:
        found = sympy.Mul(sympy.Rational(factor.numerator, factor.denominator), found)
    try:
        return _equal(found, target)
    except MemoryError:
        raise
    except (
        Exception
    ):  # SymPy raises what it likes: what cannot be compared is not equal
        return False


def _has_both_cases(text: str) -> bool:
    """Are R and r two variables here? Elsewhere they are one."""
    letters = set(
        re.findall("[a-zA-Z]", re.sub(r"\\variable\{\w+\}|\\[a-zA-Z]+", "", text))
    )
    return len(letters) > len({letter.lower() for letter in letters})


def _symbol(name: str) -> str:
    r"""A variable that stands for what the parser would drop; letters are hexadecimal,
    as `or` in a name would be replaced."""
    return rf"\variable{{W{name.encode().hex()}}}"


def _word_symbol(match: re.Match[str]) -> str:
    words = " ".join(re.findall(r"\w+", match[1].replace(".", "").casefold()))
    if len(words) == 1 or re.fullmatch(r"[A-Z ]+", match[1]):
        return f" {match[1]} "
    return f" {_symbol(words)} " if words else " "


def _angle(match: re.Match[str]) -> str:
    """An angle by its vertex; its two rays have no order."""
    points = re.findall(r"[A-Z](?:_\{\w+\})?'*", match[1])
    if len(points) == 3:
        points = [*sorted(points[::2]), points[1]]
    return " " + _symbol("angle " + "".join(points)) + " "


def _primed(match: re.Match[str]) -> str:
    """y'' as a letter with a subscript of its own; y_{0}' too."""
    return rf"{match[1]}_{{{match[2] or ''}{900 + len(match[3])}}}"


def _function(match: re.Match[str]) -> str:
    r"""`\gcd(m, n)` of letters as a function of its sorted arguments: SymPy takes it for 1."""
    if not re.search("[a-zA-Z]", match[2]):
        return match[0]
    arguments = ",".join(sorted(part.strip() for part in match[2].split(",")))
    return rf"f_{{{len(match[1])}{ord(match[1][0])}}}({arguments})"


def _ratio(match: re.Match[str]) -> str:
    """1:2:3 as what it is a ratio of, over its first term; the parser would divide."""
    first, *others = (part.strip() for part in match[0].split(":"))
    return "(" + ", ".join(rf"\frac{{{part}}}{{{first}}}" for part in others) + ")"


_IMAGINARY = _symbol("imaginary unit")
# What latex2sympy drops, or cannot read, as symbols that it keeps.
_MARKS: list[Rule] = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\text\{([^{}]*)\}", _word_symbol),
        (r"\\angle\s*\{?([A-Z](?:_\{\w+\}|'|[A-Z ])*)\}?", _angle),
        (
            r",? ?\\ldots ?(,?) ?",
            lambda m: (", " if m[1] else " ") + _symbol("dots") + (m[1] or "") + " ",
        ),
        (r"(?<![a-zA-Z\\])([a-zA-Z])(?:_\{(\w+)\})?('+)", _primed),
        (r"(?<![a-zA-Z\\])([eE])_\{(\w+)\}", lambda m: _symbol(f"{m[1]} {m[2]}")),
        (r"\\(gcd|lcm) ?\(([^()]*)\)", _function),
        (r"\\(max|min) ?\\\{([^{}]*)\\\}", r"\\\1(\2)"),
        (
            r"\\(sin|cos|tan|cot|sec|csc|ln|log|exp|arcsin|arccos|arctan|sinh|cosh|tanh|max|min) (?=[({])",
            r"\\\1",
        ),
        (r"(?<![\w:}])\d+(?:\.\d+)? ?(?:: ?\d+(?:\.\d+)? ?){2,}(?![\w:])", _ratio),
        # {x | x < 3} is its condition.
        (
            r"^\\\{ ?([a-z])(?: ?\\in ?\\mathbb\{R\})? ?(?:\\mid|\\vert|:|\|) ?(.*\1.*)\\\}$",
            r"\2",
        ),
        # Else these are the constant of Euler and Mascheroni.
        (r"\\gamma(?![a-z])|\\Gamma(?! ?\()(?![a-z])", lambda m: _symbol(m[0])),
        # Else I is the imaginary unit there, and i a variable. An index is none.
        (r"(?<![a-zA-Z\\])I(?![a-zA-Z_(])", lambda m: _symbol("I")),
        (r"(?<![a-zA-Z\\_])(?<!_\{)i(?![a-zA-Z_=])", lambda m: _IMAGINARY),
    )
]


_DIFFERENTIAL = re.compile(r"\\int(?![a-z])|\\frac\{ ?d(?:[^{}]|\{[^{}]*\})*\}\{ ?d")


def _marked(text: str) -> str:
    """The text as the parser shall read it."""
    text = apply(_MARKS, text)
    if not _DIFFERENTIAL.search(text):  # there, d n is a product
        text = re.sub(
            r"\\variable\{\w+\}|\\[a-zA-Z]+|d",
            lambda m: _symbol("d") if m[0] == "d" else m[0],
            text,
        )
    return _integers(_rising(text)).strip()


def _integers(text: str) -> str:
    """A family such as k pi, k in Z: its parameter has no name of its own."""
    match = re.search(r"[,;] ?([a-z]) ?\\in ?\\mathbb\{([ZN])\}$", text)
    if match is None:
        return text
    parameter = _symbol(f"any {match[2]}")
    family = re.sub(
        rf"(?<![a-zA-Z\\]){match[1]}(?![a-zA-Z])",
        lambda _: f" {parameter} ",
        text[: match.start()],
    )
    return f"{family}, {_symbol('family')}"


def _rising(text: str) -> str:
    r"""`5 \ge x \ge -1` as `-1 \le x \le 5`."""
    parts = _CHAIN.split(text)
    signs = parts[1::2]
    if (
        len(signs) < 2
        or "," in text
        or not all(sign in (">", r"\ge") for sign in signs)
    ):
        return text
    return " ".join(_TURNED.get(part, part) for part in reversed(parts))


@functools.lru_cache(maxsize=256)
def _parse(text: str, fold: bool, real: bool) -> Any:
    """The SymPy value of a text, or of its last equation's right side; None if neither."""
    for part in dict.fromkeys([text, re.split(r"(?<![<>!])=", text)[-1]]):
        try:
            value = latex2sympy(
                normalize_latex(part, _NORMALIZATION),
                is_real=real or None,
                normalization_config=None,
                conversion_config=ConversionConfig(lowercase_symbols=fold),
            )
            return _with_imaginary_unit(value)
        except MemoryError:
            raise
        except Exception:  # the parser raises what it likes
            continue
    return None


def _with_imaginary_unit(value: Any) -> Any:
    units = [
        s for s in value.free_symbols if s.name.lower() == _IMAGINARY[10:-1].lower()
    ]
    return value.subs(dict.fromkeys(units, sympy.I)) if units else value


def _equal(answer: Any, accepted: Any) -> bool:
    """math-verify's verdict, looked at once more; of two exact numbers, their equality."""
    if any(side.has(sympy.zoo, sympy.nan) for side in (answer, accepted)):
        return False  # the parser lost its way
    if _is_number(answer) and _is_number(accepted):
        one, other = _exact(answer), _exact(accepted)
        if _same_number(one, other):
            return True
        if not (_has_decimal(answer) or _has_decimal(accepted)):
            return False
    # The option lets `x > 2` stand for `(2, \infty)` both ways round.
    options = {"allow_set_relation_comp": True, "timeout_seconds": 0}
    if verify(accepted, answer, **options):
        return _agree(answer, accepted)
    if _has_decimal(answer) or _has_decimal(accepted):
        return bool(verify(_fractions(accepted), _fractions(answer), **options))
    return _same_for_positive(answer, accepted)


def _agree(answer: Any, accepted: Any) -> bool:
    """A yes of math-verify, number by number: it rounds to six places and drops what is
    smaller than its precision, so 0 was 1e-10.

    Elements, ends, right sides and values at a few points must agree exactly or, where
    one is a decimal, relatively to its digits.
    """
    if isinstance(answer, sympy.Eq) != isinstance(accepted, sympy.Eq):
        answer, accepted = (
            v.rhs if isinstance(v, sympy.Eq) else v for v in (answer, accepted)
        )
    elif isinstance(answer, sympy.Eq):
        if answer.lhs != accepted.lhs:
            return True  # an equation, turned round or multiplied
        return _agree(answer.rhs, accepted.rhs)
    if _is_number(answer) and _is_number(accepted):
        decimal = _has_decimal(answer) or _has_decimal(accepted)
        tolerance = _DECIMAL_TOLERANCE if decimal else sympy.S.Zero
        return _same_number(_exact(answer), _exact(accepted), tolerance)
    parts, others = _parts(answer), _parts(accepted)
    if parts and others:
        matched = [[_agree(part, other) for other in others] for part in parts]
        return all(map(any, matched)) and all(map(any, zip(*matched, strict=True)))
    if isinstance(answer, sympy.Expr) and isinstance(accepted, sympy.Expr):
        return _same_at_points(
            answer, accepted, _has_decimal(answer) or _has_decimal(accepted)
        )
    return True


def _parts(value: Any) -> list[Any]:
    """The elements of a set, tuple or matrix, or the two ends of an interval."""
    if isinstance(value, sympy.MatrixBase):
        return list(value.flat())
    if isinstance(value, sympy.Interval):
        return [value.start, value.end]
    if isinstance(value, sympy.FiniteSet | sympy.Tuple | sympy.Union):
        return list(value.args)
    return []


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, sympy.Expr)
        and not value.free_symbols
        and not value.has(AppliedUndef)
    )


def _has_decimal(value: Any) -> bool:
    return isinstance(value, sympy.Basic) and value.has(sympy.Float)


def _fractions(value: Any) -> Any:
    """The value with its decimals as fractions."""
    if not isinstance(value, sympy.Basic):
        return value
    return value.xreplace({f: sympy.Rational(str(f)) for f in value.atoms(sympy.Float)})


def _exact(value: Any) -> Any:
    return _fractions(value).doit()


def _same_number(one: Any, other: Any, tolerance: Any = sympy.S.Zero) -> bool:
    """Equal exactly, or up to a relative tolerance."""
    if one == other:
        return True
    if one.is_Rational and other.is_Rational:
        return bool(abs(one - other) <= tolerance * max(abs(one), abs(other)))
    one_value, other_value = one.evalf(_DIGITS), other.evalf(_DIGITS)
    scale = sympy.Max(abs(one_value), abs(other_value))
    if not scale.is_finite:
        return False
    # Of two sums that cancel to nothing, digits say nothing.
    if abs(one_value) < 1e-40 * scale or abs(other_value) < 1e-40 * scale:
        return bool(sympy.simplify(one - other) == 0)
    most = sympy.Max(tolerance, sympy.Float(10) ** (10 - _DIGITS))
    return bool(abs(one_value - other_value) <= most * scale)


def _same_at_points(one: Any, other: Any, decimal: bool) -> bool:
    """Equal values at a few positive points of the variables."""
    tolerance = _DECIMAL_TOLERANCE if decimal else sympy.S.Zero
    functions = {
        f: sympy.Symbol(str(f))
        for f in one.atoms(AppliedUndef) | other.atoms(AppliedUndef)
    }
    one, other = one.xreplace(functions), other.xreplace(functions)
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    for point in range(_POINTS):
        values = {
            s: sympy.Rational(97 + 31 * i + 53 * point, 101)
            for i, s in enumerate(symbols)
        }
        here, there = (_exact(side).xreplace(values).doit() for side in (one, other))
        if not (_is_number(here) and _is_number(there)):
            return False
        if not _same_number(here, there, tolerance):
            return False
    return True


def _same_for_positive(answer: Any, accepted: Any) -> bool:
    r"""Are expressions equal where their variables are positive, such as `\sqrt{1/n}`?"""
    if not (isinstance(answer, sympy.Expr) and isinstance(accepted, sympy.Expr)):
        return False
    if answer.free_symbols != accepted.free_symbols or not answer.free_symbols:
        return False
    if any(
        side.has(sympy.Abs, sympy.floor, sympy.ceiling, sympy.Mod, sympy.Float)
        for side in (answer, accepted)
    ):
        return False
    return _same_at_points(answer, accepted, decimal=False)
