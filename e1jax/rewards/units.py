r"""Units of an answer: the text behind its number, and whether two units agree.

An answer may leave out the unit of the accepted one, and may have one that the accepted
answer leaves out. Two known units must be equal, or convert: 0.5 m is 50 cm. Nouns that
are no units (`12 \text{apples}`) say nothing, words that decide (`5 \text{or more}`) are
left in the answer.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from e1jax.rewards.spelling import DECIDING


class Unit(NamedTuple):
    """A product of powers of dimensions, and its size in their base units."""

    powers: frozenset[tuple[str, int]]
    size: Fraction
    primed: bool = False  # written as ' or '', which may mean other things too


# Names of units and their sizes in the base unit of a dimension. A name of two letters
# or less is an abbreviation, with its case; others may be plural.
_TABLE = {
    "length": "m 1, meter 1, metre 1, km 1000, kilometer 1000, kilometre 1000, cm 1/100, "
    "centimeter 1/100, centimetre 1/100, mm 1/1000, millimeter 1/1000, um 1/1000000, "
    "micrometer 1/1000000, micron 1/1000000, nm 1/1000000000, nanometer 1/1000000000, "
    "angstrom 1/10000000000, in 0.0254, inch 0.0254, inches 0.0254, ft 0.3048, foot 0.3048, "
    "feet 0.3048, yd 0.9144, yard 0.9144, mi 1609.344, mile 1609.344",
    "time": "s 1, sec 1, second 1, ms 1/1000, min 60, minute 60, h 3600, hr 3600, hour 3600, "
    "day 86400, week 604800",
    "month": "month 1, year 12, yr 12",
    "mass": "kg 1, kilogram 1, g 1/1000, gram 1/1000, mg 1/1000000, lb 0.45359237, "
    "pound 0.45359237, oz 0.028349523125, ounce 0.028349523125",
    "angle": r"\degree 1, degree 1, deg 1, ' 1/60, arcmin 1/60, arcminute 1/60, '' 1/3600, "
    "arcsec 1/3600, arcsecond 1/3600",
    "radian": "rad 1, radian 1",
    "money": r"\$ 1, dollar 1, cent 1/100, USD 1",
    "euro": "€ 1, euro 1",
    "sterling": "sterling 1",
    "kelvin": "K 1, kelvin 1",
    "celsius": r"\degreeC 1",
    "fahrenheit": r"\degreeF 1",
    "current": "A 1, ampere 1, amp 1, mA 1/1000",
    "voltage": "V 1, volt 1, kV 1000, mV 1/1000",
    "resistance": r"\Omega 1, ohm 1",
    "force": "N 1, newton 1, kN 1000",
    "energy": "J 1, joule 1, kJ 1000",
    "erg": "erg 1",
    "electronvolt": "eV 1, keV 1000, MeV 1000000, GeV 1000000000",
    "power": "W 1, watt 1, kW 1000, MW 1000000",
    "pressure": "Pa 1, pascal 1, kPa 1000",
    "frequency": "Hz 1, hertz 1, kHz 1000, MHz 1000000, GHz 1000000000",
    "amount": "mol 1, mole 1",
    "morning": "am 1",
    "afternoon": "pm 1",
}
_VOLUMES = "L 1/1000, liter 1/1000, litre 1/1000, mL 1/1000000, ml 1/1000000"
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}

Factors = tuple[dict[str, int], Fraction]


def _units() -> dict[str, Factors]:
    rows = [(names, {dimension: 1}) for dimension, names in _TABLE.items()]
    units: dict[str, Factors] = {
        "mph": ({"length": 1, "time": -1}, Fraction("1609.344") / 3600),
        "kmph": ({"length": 1, "time": -1}, Fraction(1000, 3600)),
    }
    for names, powers in [*rows, (_VOLUMES, {"length": 3})]:
        for item in names.split(", "):
            name, size = item.split(" ")
            units[name] = powers, Fraction(size)
    plural = {f"{n}s": unit for n, unit in units.items() if n.isalpha() and len(n) > 2}
    return plural | units


_UNITS = _units()


def _any_of(names: list[str]) -> str:
    return "|".join(sorted(map(re.escape, names), key=len, reverse=True))


# Without \text{}, names that are hardly products of variables; after a number and a
# space, all names.
_LONG = _any_of(
    [
        *["cm", "mm", "km", "kg", "Hz", "ft", "lb", "kHz", "nm", "eV"],
        *(n for n in _UNITS if n.isalpha() and len(n) > 2),
    ]
)
_ALL = _any_of([n for n in _UNITS if n.isalpha()])
_END = r"(?![a-zA-Z])"
_NAME = (
    rf"\\text\{{[^{{}}]*\}}|\\degree(?: ?[CF]{_END})?|\\Omega{_END}|'{{1,2}}+(?!')|\{{ ?(?:{_ALL}) ?\}}"
    rf"|(?<![a-zA-Z\\])(?:{_LONG}){_END}|(?:(?<=\d )|(?<=\}} )|(?<=/)|(?<=/ ))(?:{_ALL}){_END}"
)
_TAIL = re.compile(
    rf"(?:(?:\s|/|per |square |cubic |\\cdot )*+(?>{_NAME})(?:\s*+\^\{{-?\d\}})?)++$"
)
_CURRENCY = re.compile(
    r"^(-?)\s*(\\?\$|€|\\text\{sterling\}|USD|\\text\{USD\})\s*(?=[\d\\])"
)
_UNIT_FRACTION = re.compile(
    r"\\frac\{((?:[^{}]|\\text\{[^{}]*\})*)\}\{( *\\text(?:[^{}]|\{[^{}]*\})*)\}$"
)
_TOKENS = re.compile(
    r"\\\$|€|\\degree(?: ?[CF](?![a-z]))?|\\Omega|''?|mod\d+|[a-zA-Z]+\.?|\^\{?(-?\d)\}?|/|\S"
)
_SUM = re.compile(
    r"(\d+(?:\.\d+)?) ?\\text\{([a-z]+)\},? ?(\d+(?:\.\d+)?) ?\\text\{([a-z]+)\}"
)


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""The value of a spelled answer, and its unit, None if there is none that is known.

    `12 \text{cm}^{2}` is 12 and a squared length; `12 \text{apples}` is 12.
    """
    if match := _CURRENCY.match(text):
        name = match[2].removeprefix(r"\text{").removesuffix("}")
        return match[1] + text[match.end() :], parse_unit(
            r"\$" if "$" in name else name
        )
    text = re.sub(
        r"(?<=\d)\s*(?:\\?\$|(€))$",
        lambda m: r" \text{euro}" if m[1] else r" \text{dollar}",
        text,
    )
    text = _UNIT_FRACTION.sub(r"\1/\2", text).strip()
    match = _TAIL.search(text)
    # A prime behind a letter is a derivative, not a minute of arc.
    while (
        match and "'" in match[0] and re.search(r"[a-zA-Z]\s*$", text[: match.start()])
    ):
        match = None
    if match is None or not re.search(r"[\w})\]!.]\s*$", text[: match.start()]):
        return text, None
    tail = re.sub(r"\\text\{([^{}]*)\}|\{ ?([a-zA-Z]+) ?\}", r" \1\2 ", match[0])
    unit = parse_unit(tail)
    if unit is None and not _is_noun(tail):
        return text, None
    return text[: match.start()].strip(), unit


def _is_noun(text: str) -> bool:
    """Letters alone, but none that could be a variable, nor a word that decides."""
    words = re.findall(r"[a-zA-Z]+", text)
    plain = re.fullmatch(r"[a-zA-Z\s.^{}\d/()'-]*", text) and "'" not in text
    return bool(
        plain and words and max(map(len, words)) > 2 and not DECIDING.search(text)
    )


def join_sums(text: str) -> str:
    """2 hours 30 minutes as 2.5 hours."""
    return _SUM.sub(_sum, text)


def _sum(match: re.Match[str]) -> str:
    first, second = parse_unit(match[2]), parse_unit(match[4])
    if first is None or second is None or first.powers != second.powers:
        return match[0]
    if first.size <= second.size:  # a list of lengths
        return match[0]
    value = Fraction(match[1]) + Fraction(match[3]) * second.size / first.size
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}} \text{{{match[2]}}}"


def conversion(answer: Unit | None, accepted: Unit | None) -> Fraction | None:
    """The factor from the answer's unit to the accepted one, None if they differ in kind."""
    if answer is None or accepted is None:
        return None if answer is not None and answer.primed else Fraction(1)
    if answer.powers == accepted.powers:
        return answer.size / accepted.size
    if len(accepted.powers) == 1:  # people write cm for square cm
        [(dimension, power)] = accepted.powers
        simple = answer.powers == frozenset({(dimension, 1)})
        if simple and answer.size**power == accepted.size:
            return Fraction(1)
    return None


def is_angle(unit: Unit | None) -> bool:
    """Whether a unit is an angle, such as degrees or radians."""
    return unit is not None and unit.powers == frozenset({("angle", 1)})


def parse_unit(text: str) -> Unit | None:
    """A unit from its text, such as "square cm" or "km / h", None if a name is unknown."""
    factors: list[tuple[Factors, int]] = []
    sign, next_power = 1, 1
    for token in _TOKENS.finditer(text):
        name = token[0].rstrip(".").replace(" ", "")
        if name in ("/", "per"):
            sign = -1
        elif name.lower() in _POWERS:
            next_power = _POWERS[name.lower()]
        elif token[1] and factors:  # an exponent
            factors[-1] = (factors[-1][0], factors[-1][1] * int(token[1]))
        elif unit := _known(name):
            factors.append((unit, sign * next_power))
            next_power = 1
        elif name not in ("", "\\", "cdot"):
            return None
    return _product(factors, primed="'" in text) if factors else None


def _known(name: str) -> Factors | None:
    if name.startswith("mod") and name[3:].isdigit():
        return {name: 1}, Fraction(1)
    return _UNITS.get(name) or _UNITS.get(name.lower() if len(name) > 2 else name)


def _product(factors: list[tuple[Factors, int]], primed: bool) -> Unit:
    powers: dict[str, int] = {}
    size = Fraction(1)
    for (dimensions, factor), power in factors:
        size *= factor**power
        for dimension, exponent in dimensions.items():
            powers[dimension] = powers.get(dimension, 0) + exponent * power
    return Unit(frozenset(powers.items()), size, primed)
