r"""Units of an answer: what stands behind its number, and whether two units agree.

An answer may leave out the unit of the accepted one, and may have one that the accepted
answer leaves out. Two known units must be equal, or convert: 0.5 m is 50 cm. Nouns that
are no units (`12 \text{ apples}`) say nothing, words that decide (`5 \text{ or more}`)
are left in the answer.
"""

import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """A product of powers of dimensions, and its size in their base units."""

    powers: frozenset[tuple[str, int]]
    size: Fraction
    primed: bool = False  # written as ' or '', which may mean other things too


# Base unit of each dimension: names as written, and the size in base units. A name of
# two letters or less is an abbreviation, with its case; others also have a plural.
_TABLE = {
    "length": {
        **{"m": "1", "meter": "1", "metre": "1", "km": "1000", "kilometer": "1000"},
        **{"kilometre": "1000", "cm": "1/100", "centimeter": "1/100", "mm": "1/1000"},
        **{"centimetre": "1/100", "millimeter": "1/1000", "millimetre": "1/1000"},
        **{"nm": "1/1000000000", "in": "0.0254", "inch": "0.0254", "inches": "0.0254"},
        **{"ft": "0.3048", "foot": "0.3048", "feet": "0.3048", "yd": "0.9144"},
        **{"yard": "0.9144", "mi": "1609.344", "mile": "1609.344"},
    },
    "time": {
        **{"s": "1", "sec": "1", "second": "1", "ms": "1/1000", "min": "60"},
        **{"minute": "60", "h": "3600", "hr": "3600", "hour": "3600", "day": "86400"},
        "week": "604800",
    },
    "month": {"month": "1", "year": "12", "yr": "12"},
    "mass": {
        **{"kg": "1", "kilogram": "1", "g": "1/1000", "gram": "1/1000"},
        **{"mg": "1/1000000", "lb": "0.45359237", "pound": "0.45359237"},
        **{"oz": "0.028349523125", "ounce": "0.028349523125"},
    },
    "angle": {
        **{r"\degree": "1", "degree": "1", "deg": "1", "arcmin": "1/60", "'": "1/60"},
        **{
            "arcminute": "1/60",
            "arcsec": "1/3600",
            "arcsecond": "1/3600",
            "''": "1/3600",
        },
    },
    "radian": {"rad": "1", "radian": "1"},
    "money": {r"\$": "1", "dollar": "1", "cent": "1/100", "USD": "1"},
    "euro": {"€": "1", "euro": "1"},
    "temperature": {"K": "1", "kelvin": "1"},
    "celsius": {r"\degree C": "1", "celsius": "1"},
    "fahrenheit": {r"\degree F": "1", "fahrenheit": "1"},
    "current": {"A": "1", "ampere": "1", "amp": "1", "mA": "1/1000"},
    "voltage": {"V": "1", "volt": "1", "kV": "1000", "mV": "1/1000"},
    "force": {"N": "1", "newton": "1", "kN": "1000"},
    "energy": {"J": "1", "joule": "1", "kJ": "1000"},
    "electronvolt": {"eV": "1", "keV": "1000", "MeV": "1000000"},
    "power": {"W": "1", "watt": "1", "kW": "1000", "MW": "1000000"},
    "pressure": {"Pa": "1", "pascal": "1", "kPa": "1000"},
    "frequency": {
        "Hz": "1",
        "hertz": "1",
        "kHz": "1000",
        "MHz": "1000000",
        "GHz": "1000000000",
    },
    "amount": {"mol": "1", "mole": "1"},
}
_VOLUMES = {
    "L": "1/1000",
    "liter": "1/1000",
    "litre": "1/1000",
    "mL": "1/1000000",
    "ml": "1/1000000",
}
_SPEEDS = {"mph": Fraction("1609.344") / 3600, "kmph": Fraction(1000, 3600)}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def _units() -> dict[str, tuple[dict[str, int], Fraction]]:
    units = {
        name: ({dimension: 1}, Fraction(size))
        for dimension, names in _TABLE.items()
        for name, size in names.items()
    }
    units |= {name: ({"length": 3}, Fraction(size)) for name, size in _VOLUMES.items()}
    units |= {name: ({"length": 1, "time": -1}, size) for name, size in _SPEEDS.items()}
    plural = {
        f"{name}s": unit
        for name, unit in units.items()
        if name.isalpha() and len(name) > 2
    }
    return plural | units


_UNITS = _units()
# Without \text{} around them, only names that are hardly products of variables.
_BARE = "|".join(
    sorted(
        {
            "cm",
            "mm",
            "km",
            "kg",
            "Hz",
            "ft",
            "lb",
            *(n for n in _UNITS if n.isalpha() and len(n) > 2),
        },
        key=len,
        reverse=True,
    )
)
_NAME = rf"\\text\{{[^{{}}]*\}}|\\degree(?: ?[CF](?![a-z]))?|''?|(?<![a-zA-Z\\])(?:{_BARE})(?![a-zA-Z])"
_TAIL = re.compile(rf"(?:(?:\s|/|per |\\cdot )*(?:{_NAME})(?:\s*\^\{{-?\d\}})?)+$")
_CURRENCY = re.compile(r"^(-?)\s*(\\?\$|€)\s*(?=[\d\\])")
_UNIT_FRACTION = re.compile(
    r"\\frac\{((?:[^{}]|\\text\{[^{}]*\})*)\}\{( *\\text(?:[^{}]|\{[^{}]*\})*)\}$"
)
_TOKENS = re.compile(
    r"\\\$|€|\\degree(?: ?[CF](?![a-z]))?|''?|[a-zA-Z]+\.?|\^\{?(-?\d)\}?|/|\S"
)
# A text with one of these is more than a unit or a noun.
_DECIDING = re.compile(
    r"(?i)\b(?:not|non?|or|and|n?either|more|less|fewer|least|most|above|below|over|under|even"
    r"|odd|wrong|incorrect|false|true|except|between|is|are|if|when|only|than|prime|composite"
    r"|positive|negative|a\.?m|p\.?m|mod|base|squared|cubed|dozen|half|percent\w*|pct|in|to"
    r"|north|south|east|west|left|right|up|down|\w*clockwise|increase|decrease|loss|gain|all"
    r"|any|every|each|approx\w*|about|times|factorial|plus|minus|e|i)\b"
)


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""The value of a spelled answer, and its unit, None if there is none that is known.

    `12 \text{cm}^{2}` is 12 and a squared length; `12 \text{apples}` is 12.
    """
    if match := _CURRENCY.match(text):
        return match[1] + text[match.end() :], _parse(match[2].replace("$", r"\$")[-2:])
    text = re.sub(r"(?<=\d)\s*\\?\$$", r" \\text{dollar}", text)
    text = _UNIT_FRACTION.sub(r"\1/\2", text)
    match = _TAIL.search(text)
    # A prime behind a letter is a derivative, not a minute of arc.
    while (
        match and re.search(r"[a-zA-Z]\s*$", text[: match.start()]) and "'" in match[0]
    ):
        match = None
    if match is None or not re.search(r"[\w})\]!.]\s*$", text[: match.start()]):
        return text, None
    tail = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", match[0])
    unit = _parse(tail)
    if unit is None and (
        _DECIDING.search(tail) or not re.fullmatch(r"[a-zA-Z\s.^{}\d-]*", tail)
    ):
        return text, None
    return text[: match.start()].strip(), unit


def conversion(answer: Unit | None, accepted: Unit | None) -> Fraction | None:
    """The factor from the answer's unit to the accepted one, None if they differ in kind."""
    if answer is None or accepted is None:
        return None if answer is not None and answer.primed else Fraction(1)
    if answer.powers == accepted.powers:
        return answer.size / accepted.size
    if len(accepted.powers) == 1:  # people write cm for square cm
        [(dimension, power)] = accepted.powers
        if (
            answer == Unit(frozenset({(dimension, 1)}), answer.size)
            and answer.size**power == accepted.size
        ):
            return Fraction(1)
    return None


def _parse(text: str) -> Unit | None:
    """A unit from its text, such as "square cm" or "km / h", None if a name is unknown."""
    powers: dict[str, int] = {}
    size, sign, next_power, factors = Fraction(1), 1, 1, []
    for token in _TOKENS.finditer(text):
        name = token[0].rstrip(".")
        if name == "/" or name == "per":
            sign = -1
        elif name.lower() in _POWERS:
            next_power = _POWERS[name.lower()]
        elif token[1] and factors:  # an exponent
            factors[-1] = (factors[-1][0], factors[-1][1] * int(token[1]))
        elif unit := _UNITS.get(name) or _UNITS.get(
            name.lower() if len(name) > 2 else name
        ):
            factors.append((unit, sign * next_power))
            next_power = 1
        elif name not in ("", "\\", "cdot"):
            return None
    for (dimensions, factor), power in factors:
        size *= factor**power
        for dimension, exponent in dimensions.items():
            powers[dimension] = powers.get(dimension, 0) + exponent * power
    if not factors:
        return None
    return Unit(frozenset(powers.items()), size, "'" in text)
