"""Are two SymPy values equal? math-verify's verdict, and a check of every yes.

math-verify rounds decimals to six places and drops digits below its precision, so that
0 was equal to 1e-10. After its yes, numbers must also agree exactly or, where one of them is a decimal, to a
relative 1e-5; in sets, intervals, inequalities, matrices and expressions, number by
number.
"""

import functools
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import (
    ConversionConfig,
    NormalizationConfig,
    normalize_latex,
)
from math_verify import verify
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from e1jax.rewards.marks import IMAGINARY

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


@functools.lru_cache(maxsize=256)
def parse(text: str, fold: bool, real: bool) -> Any:
    """The SymPy value of a marked text, None if it has none.

    `fold`: capital letters are small ones. `real`: variables are real numbers.
    """
    try:
        value = latex2sympy(
            normalize_latex(text, _NORMALIZATION),
            is_real=real or None,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=fold),
        )
        return _with_imaginary_unit(value)
    except MemoryError:
        raise
    except Exception:  # of many kinds
        return None


def _with_imaginary_unit(value: Any) -> Any:
    name = IMAGINARY.removeprefix(r"\variable{").removesuffix("}").lower()
    units = [s for s in value.free_symbols if s.name.lower() == name]
    return value.subs(dict.fromkeys(units, sympy.I)) if units else value


def equal(answer: Any, accepted: Any) -> bool:
    """True if two values of `parse` are equal."""
    try:
        return _equal(answer, accepted)
    except MemoryError:
        raise
    except Exception:  # of many kinds; values that cannot be compared are not equal
        return False


def _equal(answer: Any, accepted: Any) -> bool:
    if any(side.has(sympy.zoo, sympy.nan) for side in (answer, accepted)):
        return False  # math-verify's parser misread one of them
    if is_number(answer) and is_number(accepted):
        if _same_number(exact(answer), exact(accepted)):
            return True
        if not (_has_decimal(answer) or _has_decimal(accepted)):
            return False
    elif _is_refuted(answer, accepted):
        return False
    # The option lets `x > 2` stand for `(2, \infty)` both ways round.
    options = {"allow_set_relation_comp": True, "timeout_seconds": 0}
    if verify(accepted, answer, **options):
        return _agree(answer, accepted)
    if _has_decimal(answer) or _has_decimal(accepted):
        return bool(verify(_fractions(accepted), _fractions(answer), **options))
    return _same_for_positive(answer, accepted)


def _is_refuted(answer: Any, accepted: Any) -> bool:
    """Would a yes of math-verify fail `_agree`? Values at a few points tell this a
    hundred times sooner than math-verify says no, which long lists are full of."""
    if _has_decimal(answer) or _has_decimal(accepted):
        return False
    sides = answer, accepted
    expressions = all(isinstance(side, sympy.Expr) for side in sides)
    equations = all(isinstance(side, sympy.Eq) for side in sides)
    return (expressions or equations) and not _agree(answer, accepted)


def _agree(answer: Any, accepted: Any) -> bool:
    """A yes of math-verify, number by number."""
    if isinstance(answer, sympy.Eq) != isinstance(accepted, sympy.Eq):
        answer, accepted = (
            v.rhs if isinstance(v, sympy.Eq) else v for v in (answer, accepted)
        )
    elif isinstance(answer, sympy.Eq):
        if answer.lhs != accepted.lhs:
            return True  # an equation, turned round or multiplied
        return _agree(answer.rhs, accepted.rhs)
    decimal = _has_decimal(answer) or _has_decimal(accepted)
    tolerance = _DECIMAL_TOLERANCE if decimal else sympy.S.Zero
    if is_number(answer) and is_number(accepted):
        return _same_number(exact(answer), exact(accepted), tolerance)
    parts, others = _parts(answer), _parts(accepted)
    if parts and others:
        matched = [[_agree(part, other) for other in others] for part in parts]
        return all(map(any, matched)) and all(map(any, zip(*matched, strict=True)))
    if isinstance(answer, sympy.Expr) and isinstance(accepted, sympy.Expr):
        return _same_at_points(answer, accepted, tolerance)
    if isinstance(answer, Boolean) and isinstance(accepted, Boolean):
        return _same_solutions(answer, accepted)
    return True


def _same_solutions(answer: Any, accepted: Any) -> bool:
    """Do inequalities of one variable hold on intervals with equal ends? Of several
    variables, or where SymPy has no such set, math-verify's yes stands."""
    try:
        found, target = answer.as_set(), accepted.as_set()
    except Exception:
        return True
    return _agree(found, target)


def _parts(value: Any) -> list[Any]:
    """The elements of a set, tuple or matrix, or the two ends of an interval."""
    if isinstance(value, sympy.MatrixBase):
        return list(value.flat())
    if isinstance(value, sympy.Interval):
        return [value.start, value.end]
    if isinstance(value, sympy.FiniteSet | sympy.Tuple | sympy.Union):
        return list(value.args)
    return []


def is_number(value: Any) -> bool:
    """Has the value neither variables nor unknown functions?"""
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


def exact(value: Any) -> Any:
    """The value without decimals, evaluated."""
    return _fractions(value).doit()


def same_rounded(one: Any, other: Any, places: int) -> bool:
    """Are two numbers equal, or equal once rounded to a number of decimal places?"""
    one, other = exact(one), exact(other)
    if _same_number(one, other) or not (one.is_real and other.is_real):
        return _same_number(one, other)
    return bool(abs((one - other).evalf(_DIGITS)) * 2 <= sympy.Integer(10) ** -places)


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
    # A sum that cancels has no correct digits.
    if abs(one_value) < 1e-40 * scale or abs(other_value) < 1e-40 * scale:
        return bool(sympy.simplify(one - other) == 0)
    most = sympy.Max(tolerance, sympy.Float(10) ** (10 - _DIGITS))
    return bool(abs(one_value - other_value) <= most * scale)


def _same_at_points(one: Any, other: Any, tolerance: Any = sympy.S.Zero) -> bool:
    """Equal values at a few positive points of the variables."""
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
        here, there = (exact(side).xreplace(values).doit() for side in (one, other))
        if not (is_number(here) and is_number(there)):
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
    steps = sympy.Abs, sympy.floor, sympy.ceiling, sympy.Mod, sympy.Float
    if answer.has(*steps) or accepted.has(*steps):
        return False
    return _same_at_points(answer, accepted)
