r"""Notation that latex2sympy drops or misreads, rewritten so that it survives.

math-verify's parser ignores words, primes, bases and angles, takes `\gamma` for a
number and `d n` for a differential. Here each becomes a variable of its own,
`\variable{W...}`, which no other text is equal to.
"""

import re

from e1jax.rewards.tex import Rule, apply, rules

_HEXADECIMAL = r"[0-9A-F]{2,}(?=\)?_\{ *\(?1[1-6])"
_BASE = re.compile(
    rf"\(?\b([0-9]+|{_HEXADECIMAL})\)?_\{{ *\(?(\d+|\\text\{{[a-z]+\}} *)\)?\}}"
)
_BASES = dict(
    zip(
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
        map(str, range(2, 13)),
        strict=True,
    )
)
_DERIVATIVE = re.compile(
    r"\\frac\{ ?(d|\\partial)(?:\^\{(\d)\})? ?([a-zA-Z](?:_\{\w+\})?)(?:\(([a-z])\))? ?\}"
    r"\{ ?\1 ?([a-z])(?(2)\^\{\2\}) ?\}"
)
_DIFFERENTIAL = re.compile(r"\\int(?![a-z])|\\frac\{ ?d(?:[^{}]|\{[^{}]*\})*\}\{ ?d")
_CHAIN = re.compile(r"(\\[lg]e(?![a-z])|[<>])")
_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_TIME = re.compile(r"(?<![\d:])([01]?\d|2[0-4]):([0-5]\d)(?![\d:])")


def symbol(name: str, letter: bool = False) -> str:
    """A variable of its own for each name: a mark, or a stand-in for a letter.

    The name is hexadecimal, since math-verify would replace an `or` in it.
    """
    return rf"\variable{{{'V' if letter else 'W'}{name.encode().hex()}}}"


_WORDS = ("pi", "sin", "min", "lim", "inf", "if", "is", "in", "II", "III")
IMAGINARY = symbol("imaginary unit", letter=True)


def marks_of(text: str) -> set[str]:
    """The marks of a marked text. An answer must have the accepted answer's marks and no
    others: 0 times a mark would be 0."""
    return set(re.findall(r"\\variable\{W\w+\}", text))


def mark_pair(answer: str, accepted: str) -> tuple[str, str]:
    """Marks whose reading depends on the other answer: bases, derivatives, times."""
    if _TIME.search(accepted):  # 12:45 is not 4:15, though 3:4 is 6:8
        answer, accepted = (
            _TIME.sub(lambda m: symbol(f"time {int(m[1])}:{m[2]}"), text)
            for text in (answer, accepted)
        )
    answer, accepted = _derivatives(answer, accepted), _derivatives(accepted, answer)
    return _bases(answer, accepted)


def _derivatives(text: str, other: str) -> str:
    r"""dy/dx as y' or \dot{y} where the other answer writes it so, else as a symbol."""

    def written(match: re.Match[str]) -> str:
        order, letter, variable = int(match[2] or 1), match[3], match[5]
        if letter + "'" in other:
            return letter + "'" * order
        name, subscript = letter[0], letter[1:]
        dotted = rf"\{'d' * order}ot{{{name}}}"
        if dotted in other:
            return dotted + subscript
        return symbol(f"d{order} {letter} {variable}", letter=True)

    return _DERIVATIVE.sub(written, text)


def _bases(answer: str, accepted: str) -> tuple[str, str]:
    """Numbers with a base as symbols where both have one.

    The answer may leave the base out; if it alone has one, it is read in that base.
    """

    def base(match: re.Match[str]) -> str:
        name = re.sub(r"\\text\{|[} ]", "", match[2])
        return _BASES.get(name, name)

    def mark(match: re.Match[str]) -> str:
        return symbol(f"{match[1].lstrip('0')} base {base(match)}")

    def value(match: re.Match[str]) -> str:
        try:
            return str(int(match[1], int(base(match))))
        except ValueError:  # 5_3, or a base beyond 36
            return mark(match)

    if _BASE.search(answer) and _BASE.search(accepted):
        return _BASE.sub(mark, answer), _BASE.sub(mark, accepted)
    return _BASE.sub(value, answer), _BASE.sub(r"\1", accepted)


def _word(match: re.Match[str]) -> str:
    words = " ".join(re.findall(r"\w+", re.sub(r"[.-]", "", match[1]).casefold()))
    if len(words) == 1 or re.fullmatch(r"[A-Z ]+", match[1]):
        return f" {match[1]} "
    return f" {symbol(words)} " if words else " "


def _letters(match: re.Match[str]) -> str:
    """The imaginary unit among up to three letters, such as `bi` and `2it`; the parser
    would take a current I for it."""
    if match[0][0] == "\\" or match[0] in _WORDS:
        return match[0]
    letters = {"i": IMAGINARY, "I": symbol("I", letter=True)}
    return "".join(letters.get(letter, letter) for letter in match[0])


def _angle(match: re.Match[str]) -> str:
    """An angle by its vertex; its two rays have no order."""
    points = re.findall(r"[A-Z](?:_\{\w+\})?'*", match[1])
    if len(points) == 3:
        points = [*sorted(points[::2]), points[1]]
    return " " + symbol("angle " + "".join(points)) + " "


def _function(match: re.Match[str]) -> str:
    r"""`\gcd(m, n)` of letters as a function of its sorted arguments: SymPy takes it for 1."""
    if not re.search("[a-zA-Z]", match[2]):
        return match[0]
    arguments = ",".join(sorted(part.strip() for part in match[2].split(",")))
    return rf"f_{{{len(match[1])}{ord(match[1][0])}}}({arguments})"


def _ratio(match: re.Match[str]) -> str:
    """1:2:3 as the ratios to its first term; the parser would divide."""
    first, *others = (part.strip() for part in match[0].split(":"))
    return "(" + ", ".join(rf"\frac{{{part}}}{{{first}}}" for part in others) + ")"


_FUNCTION_NAMES = (
    "sin|cos|tan|cot|sec|csc|ln|log|exp|arcsin|arccos|arctan|sinh|cosh|tanh|max|min"
)
_MARKS: list[Rule] = rules(
    (r"_\{ *\\text\{([^{}]*)\} *\}", r"_{\1}"),
    (r"_\{ *\\(max|min|sup|inf|lim|deg|det) *\}", r"_{\1}"),
    (r" ?\\text\{([^{}]*)\} ?", _word),
    (r"\\angle\s*\{?([A-Z](?:_\{\w+\}|'|[A-Z ])*)\}?", _angle),
    (
        r",? ?\\ldots ?(,?) ?",
        lambda m: (", " if m[1] else " ") + symbol("dots") + (m[1] or "") + " ",
    ),
    (r"!!", lambda m: symbol("double factorial")),
    (
        r"(?<![a-zA-Z\\])([a-zA-Z])(?:_\{(\w+)\})?('+)",
        lambda m: rf"{m[1]}_{{{m[2] or ''}{900 + len(m[3])}}}",
    ),
    (
        r"(?<![a-zA-Z\\])([eEI])_\{(\w+)\}",
        lambda m: symbol(f"{m[1]} {m[2]}", letter=True),
    ),
    (r"\\(gcd|lcm) ?\(([^()]*)\)", _function),
    (r"\\(max|min) ?\\\{([^{}]*)\\\}", r"\\\1(\2)"),
    (rf"\\({_FUNCTION_NAMES}) (?=[({{])", r"\\\1"),
    (r"(?<![\w:}])\d+(?:\.\d+)? ?(?:: ?\d+(?:\.\d+)? ?){2,}(?![\w:])", _ratio),
    (r"(?<=\d) ?\(", r" \\cdot ("),  # 2(1/3) would be read as the mixed number 2 1/3
    (r"'+", lambda m: symbol(f"prime {m[0]}")),
    # The parser's gamma is the constant of Euler and Mascheroni, and its I the imaginary
    # unit. An index i is none.
    (r"\\gamma(?![a-z])|\\Gamma(?! ?\()(?![a-z])", lambda m: symbol(m[0], letter=True)),
    (
        r"\\variable\{\w+\}|\\[a-zA-Z]+|(?<!_\{)(?<![a-zA-Z_])[a-zA-Z]{1,3}(?![a-zA-Z_(]| ?=)",
        _letters,
    ),
)
_DEGREES = re.compile(
    r"(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\}|[a-z]|\)) ?\\degree ?(?![CF])"
)


def marked(text: str) -> str:
    """The text as the parser shall read it."""
    # Within a sine, degrees are a number; elsewhere they are a unit.
    degree = (
        r"\1\\cdot\\frac{\\pi}{180} "
        if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text)
        else r"\1 "
    )
    text = apply(_MARKS, _DEGREES.sub(degree, text))
    if not _DIFFERENTIAL.search(text):  # there, d n is a product
        text = re.sub(
            r"\\variable\{\w+\}|\\[a-zA-Z]+|d",
            lambda m: symbol("d", letter=True) if m[0] == "d" else m[0],
            text,
        )
    return _rising(text).strip()


def name_parameter(text: str) -> str:
    """A family such as k pi, k in Z: its parameter gets a name of its own."""
    match = re.search(r"[,;] ?([a-z]) ?\\in ?\\mathbb\{([ZN])\}$", text)
    if match is None:
        return text
    parameter = rf" \text{{any {match[2]}}} "
    letter = rf"(?<![a-zA-Z\\]){match[1]}(?![a-zA-Z])"
    return re.sub(letter, lambda _: parameter, text[: match.start()])


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
