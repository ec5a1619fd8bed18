r"""One spelling for LaTeX answers that say the same: fonts, spaces, arguments, numbers.

`spell` runs the tables of this file from top to bottom. They remove typography, words
that introduce or explain an answer, and "approximately"; all other words stay, as
`\text{...}`, and the next modules of this package read them.

`(?!A)` in a pattern ends the name of a command; see `tex.rules`.
"""

import re
import unicodedata
from fractions import Fraction

from e1jax.rewards.tex import (
    apply,
    brace_arguments,
    close_set,
    group_end,
    rules,
    without_group,
)

# A text with one of these words is more than a unit, a noun or an introduction.
DECIDING = re.compile(
    r"(?i)\b(?:not?|non|or|and|n?either|nor|but|more|less|fewer|least|most|above|below|over"
    r"|under|even|odd|wrong|incorrect|false|true|never|cannot|impossible|none|without|rejected|invalid|score|except|between|is|are|if|when|only|than"
    r"|prime|composite|positive|negative|a\.?m|p\.?m|mod|base|squared|cubed|doubled|tripled"
    r"|half|halves|halved|thirds|quarters|too|tens|dozens?|\w*ths?|\w*th|unknown|bad|grad\w*|percent\w*|pct|north\w*"
    r"|south\w*|east|west|left|right|up|down|\w*clockwise|increase|decrease|loss|gain|all|any"
    r"|every|each|approx\w*|about|times|factorial|plus|minus)\b"
)

# Characters that plain text has in place of commands.
_CHARACTERS = str.maketrans(
    dict(
        zip(
            "−–—∗·⋅×÷≤≥≠≈±∓",
            [
                *"---*",
                *(
                    rf"\{c} "
                    for c in [
                        "cdot",
                        "cdot",
                        "times",
                        "div",
                        "le",
                        "ge",
                        "ne",
                        "approx",
                        "pm",
                        "mp",
                    ]
                ),
            ],
            strict=True,
        )
    )
    | dict(
        zip(
            "∞π√∠∈∪∩∅…°º",
            (
                rf"\{c} "
                for c in [
                    "infty",
                    "pi",
                    "sqrt",
                    "angle",
                    "in",
                    "cup",
                    "cap",
                    "emptyset",
                    "ldots",
                    "degree",
                    "degree",
                ]
            ),
            strict=True,
        )
    )
    | dict(zip("′’‘“”、。", "'''\"\",.", strict=True))
    | {
        "″": "''",
        "¢": r"\text{ cent}",
        "£": r"\text{ sterling}",
        "Ω": r"\Omega ",
        "Å": r"\AA ",
    }
    | {
        c: rf"\frac{{{f[0]}}}{{{f[1]}}}"
        for c, f in {"½": "12", "⅓": "13", "⅔": "23", "¼": "14", "¾": "34"}.items()
    }
    | {c: f"^{{{i}}}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    | {c: f"_{{{i}}}" for i, c in enumerate("₀₁₂₃₄₅₆₇₈₉")}
)

# Marks that LaTeX, HTML and Markdown put around an answer, and spaces of every width.
_LAYOUT = rules(
    (r"</?(?:b|i|u|p|em|strong|span|div|br|code)\b[^<>]*/?>|&nbsp;", " "),
    (
        r"\\(?:begin|end)\s*\{(?:aligned|align\*?|equation\*?|gathered|split|math)\}",
        " ",
    ),
    (r"\\(?:left|right)\s*\.", ""),  # an invisible delimiter
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?!A)\s*", ""),
    (r"\\lbrace(?!A)", r"\\{"),
    (r"\\rbrace(?!A)", r"\\}"),
    (r"\\[hv](?:space|skip)\*?\s*\{[^{}]*\}|\\[hv]?phantom\s*\{[^{}]*\}", " "),
    (r"\\(?:q?quad|(?:neg)?(?:thin|med|thick)space|ens(?:pace|kip)|hfill)(?!A)", " "),
    (r"\s*,\s*\\!\s*", ","),  # 1,\!000
    (r"(?<!\\)\\!", ""),
    (r"~|(?<!\\)\\(?:[,;:> ]|\n)", " "),
    (r"(?<![a-zA-Z])\{ *\}", ""),
    (r"(\\\\)(?:\\\\|\s*\[[^\]]*\])+", r"\1"),  # the end of a row of a matrix
    (r"\\(?:text)?color(?:box)?\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}", ""),
    (r"\\(?:tag|label)\s*\{[^{}]*\}", ""),
    (r"\\(?:display|text|script)style(?!A)", " "),
    (
        r"\\(?:bf|rm|it|sf|tt|em|tiny|small|large|Large|LARGE|huge|Huge|normalsize)(?!A)",
        " ",
    ),
    (
        r"\\(?:boldmath|(?:no)?limits|centering|checkmark|(?:black)?square|qed)(?!A)",
        " ",
    ),
    (r"\\[()\[\]]", " "),  # \( and \[ around mathematics
    (r"\s+", " "),
)
_ENDS = rules(
    (r"^(?:#+ |> )?[\s\"`*]+|^(?:#+|>) |[\s\"`*]+$", ""),
    (r"^__(.*)__$", r"\1"),
    (r"^'([^']*)'$", r"\1"),
    (r"\\+$", ""),
    (r"^(?:=|\\approx(?!A)|\\equiv(?!A))\s*", ""),
    (r"(?<![.\s])[\s.;:,]+$", ""),
)

# Synonyms among commands.
_SYNONYMS = rules(
    (r"\\(?:[dtc]|nice|s)frac(?!A)", r"\\frac"),
    (r"\\[dt]binom(?!A)", r"\\binom"),
    (r"\\(?:le(?:q|qq|qslant)?)(?!A)|<=", r"\\le "),
    (r"\\(?:ge(?:q|qq|qslant)?)(?!A)|>=", r"\\ge "),
    (r"\\neq?(?!A)|\\not\s*=|!=", r"\\ne "),
    (r"\\not\s*\\in(?!A)", r"\\notin "),
    (r"\\lt(?!A)", "<"),
    (r"\\gt(?!A)", ">"),
    (r"\\colon(?!A)", ":"),
    (
        r"\{([^{}]*)\\choose(?!A)([^{}]*)\}|^([^{}]*)\\choose(?!A)([^{}]*)$",
        r"\\binom{\1\3}{\2\4}",
    ),
    (r"\\(?:cdotp|ast)(?!A)|(?<=[\d}])\s*\*\s*(?=[\d\\])", r"\\cdot "),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
    (r"\\(?:[lch]?dots[cbmio]?)(?!A)", r"\\ldots "),
    (r"\\(?:varnothing|O)(?!A)", r"\\emptyset "),
    (r"\\(?:R|reals|Reals)(?!A)", r"\\mathbb{R}"),
    (r"\\([ZNQC])(?!A)", r"\\mathbb{\1}"),
    (
        r"(?<=\\in)\s*(?:\\(?:math|text)\w+\s*|\\bf\s*)?\{?\s*([ZRNQC])\s*\}?(?!A)",
        r" \\mathbb{\1}",
    ),
    (r"\\prime(?!A)", "'"),
    (r"\^\s*(?:\{\s*((?:'\s*)+)\}|('))", r"\1\2"),
    (r"(?<=')\s+(?=')", ""),
    (r"\\operatorname\s*\*", r"\\operatorname"),
    (r"\\lg(?!A)", r"\\log "),
    (r"\\?sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\AA(?!A)|\\mathring\s*\{?A\}?", r"\\text{ angstrom}"),
    (
        r"\\mu ?\\(?:text|mathrm)\s*\{\s*([a-zA-Z]+)\s*\}|[µμ]([a-zA-Z])",
        r"\\text{u\1\2}",
    ),
    (
        r"\\pmod(?!A)\s*\{?\s*(\d+)\s*\}?|\\mod(?!A)\s*\{?\s*(\d+)\s*\}?",
        r"\\text{mod\1\2}",
    ),
    (
        r"\(\s*(?:\\(?:text|mathrm|operatorname)\s*\{\s*)?mod\s*\}?\s*(\d+)\s*\}?\s*\)",
        r"\\text{mod\1}",
    ),
    # Degrees, of angle and of temperature.
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?!A))|\\degrees?(?!A)", r"\\degree "),
    (r"\\\{\s*\\\}|\\text\s*\{\s*[Ee]mpty set\s*\}", r"\\emptyset "),
    (r"\\[ij]math(?!A)", "i"),
    (r"(?<![a-zA-Z\\{])(sin|cos|tan|ln|log|exp)(?=[ (\\\d])", r"\\\1"),
    (r"\^\{(\d)\}\^\{(\d)\}", r"^{\1\2}"),  # 10²³
    (
        r"\^\s*\{?\s*\\(?:text|mathrm)\s*\{\s*o\s*\}\s*\}?|\^\s*(?:\{o\}|o(?!A))",
        r"\\degree ",
    ),
    (r"\^\s*\\degree|\\degree\s+", r"\\degree "),
    (r"\\degree ?\\(?:text|mathrm)\s*\{\s*([CF])\s*\}", r"\\degree \1"),
    (
        r"(?i)(?:\\degree|\bdegrees?) ?(c|f)(?:elsius|ahrenheit)\b",
        lambda m: rf"\degree {m[1].upper()}",
    ),
    # Bases in words.
    (r"([_^])\s*(\\text\s*\{[^{}]*\})", r"\1{\2}"),
    (r"(?<=\w) ?\\text\s*\{\s*\(?\s*base\s*\}? ?(\w+)\)?\s*\}?", r"_{\1}"),
    # Times of day.
    (
        r"(?i)(?<=\d) ?(?:\\(?:text|mathrm)\s*\{\s*)?\b([ap])\.?\s?m\b\.?(?:\s*\})?",
        lambda m: rf"\text{{{m[1].lower()}m}}",
    ),
    (r"(?i)(?:\\text\s*\{\s*)?\binfinity\b(?:\s*\})?", r"\\infty "),
    (
        r"(?i)(?:\\text\s*\{\s*)?\ball (?:real numbers|reals)\b(?:\.?\s*\})?(?!\s*\w)",
        r"\\mathbb{R}",
    ),
    (r"(?i)(?:\\text\s*\{\s*)?\ball integers\b(?:\s*\})?$", r"\\mathbb{Z}"),
)

# Commands of words, and commands of bold or framed mathematics.
_FONTS = re.compile(
    r"\\(?:(?P<math>boldsymbol|bm|pmb|mathbf|boxed|fbox|underline|ensuremath)|math(?:rm|it|sf|tt|normal)"
    r"|operatorname|emph|mbox|hbox|text(?:bf|it|rm|sf|tt|normal|up)?)\{"
)
# Possessive, so that a text that is none is not tried in every way.
# Possessive: a text that is no unit is not tried in every way.
_UNIT_LIKE = re.compile(r"(?:[a-zA-Z]++\.?(?:\^-?\d)?(?: |/|\\cdot ?)*+)++")
_MATH = re.compile(r"[+=<>\\^_]|(?<![a-zA-Z]{2})-|-(?![a-zA-Z]{2})")
_FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "ln",
        "log",
        "exp",
        "gcd",
        "lcm",
        "max",
        "min",
        "det",
        "arg",
        "sup",
        "inf",
        "lim",
        "deg",
        "dim",
        "ker",
        "sgn",
    ]
)
_UNIT_OR_FUNCTION = ("sec", "min", "deg")

# Words that only introduce an answer, repeat that it is one, or explain it.
_FILLERS = rules(
    (
        r"(?i)^(?:\\text\{)?(?:(?:the )?(?:final )?(?:answer|option|choice)s?(?: is| are)? ?[:=]?) (?=\S)(?!\}|is\b|are\b)",
        lambda m: r"\text{" if m[0][0] == "\\" else "",
    ),
    (
        r"^\\text\{[A-Za-z ,']+(?: is| are| ?[:=])\} ?:?|^\\text\{(?i:answer|therefore|thus|hence|so|then|total)\} ?[:,]?",
        lambda m: m[0] if DECIDING.search(re.sub(r" (?:is|are)\}", "", m[0])) else "",
    ),
    (
        r"(?i)\s(?:\\text\{)?(?:is|are) (?:the )?(?:final |correct )?(?:answers?|solutions?|correct)\.?\}?$",
        "",
    ),
    (
        r"(?i)\\text\{[(,]? ?(?:since|because)\b.*$|\\text\{\((?:approx\w*|exact\w*|rounded)\)\}",
        "",
    ),
    (r"(?i)\\text\{(?:is|are|an?) (?=\w)", r"\\text{"),
    (r"(?i)^\\text\{(?:approximately|about|roughly|only)\}| only(?=\}$)", " "),
    (r"\\text\{[ .;:]*\}", " "),
)
# Bare words behind a number, as a text.
_NOUNS = rules(
    (
        rf"(?<=\d) (?!(?:{'|'.join(sorted(_FUNCTIONS))}|times|mod)(?!A))([a-z]{{3,}}(?: [a-z]+)*)$",
        r" \\text{\1}",
    ),
)
# Families such as k \pi for every integer k.
_FAMILIES = rules(
    (r"\( ?([a-z]) ?\\in ?(\\mathbb\{[ZN]\}) ?\)$", r", \1\\in \2"),
    (
        r",? ?\\text\{,? ?(?:where|for|with)(?: (?:any|all|some|every))?(?: integers?)?\} ?(?=[a-z] ?(?:\\in|\\text))",
        ", ",
    ),
    (r"([a-z]) ?\\text\{(?:an )?integer\}$", r"\1\\in \\mathbb{Z}"),
    (
        r"^\\\{(.*)(?:\\mid|\\vert|:|\|) ?([a-z] ?\\in ?\\mathbb\{[ZN]\})\\\}$",
        r"\1, \2",
    ),
)

_SEPARATORS = rules(
    (r"\{ ?, ?\}", ","),
    (r"\s*,?\s*\\text\{ ?,? ?(?:and|or|\\&|&) ?,? ?\}\s*,?\s*", ", "),
    (r"\s*,?\s*(?<![a-zA-Z\\{])(?:and|or)(?![a-zA-Z])\s*,?\s*", ", "),
    (r"\s*([,;])[\s,;]*", r"\1 "),
)

_GROUPS = r"(?<![\d.,])(\d{1,3}(?:(?:,| |\{ ?, ?\})\d{3})+)(?!\d|,\d)"
_WHOLE = r"(?P<whole>\d{0,50})\.(?P<fixed>\d{0,50}?)"


def _repeating(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as the fraction 1/6."""
    whole, fixed, period = match["whole"], match["fixed"], match["period"]
    digits = int(whole + fixed + period) - int(whole + fixed or "0")
    return _fraction(Fraction(digits, (10 ** len(period) - 1) * 10 ** len(fixed)))


def _arc(match: re.Match[str]) -> str:
    r"""`22\degree 30'` as 45/2 degrees."""
    degrees, minutes, seconds = (Fraction(part or 0) for part in match.groups())
    return _fraction(degrees + minutes / 60 + seconds / 3600) + r"\degree "


def _fraction(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _power(word: str, exponent: int) -> tuple[str, str]:
    """5 million as 5 times a power of ten, with the unit that stands in the same text."""
    pattern = rf"(?i)(?<=[\d}}]) ?(?:\\text\{{ ?{word} ?([^{{}}]*)\}}|{word}(?!A))"
    return pattern, rf"\\cdot 10^{{{exponent}}}\\text{{\1}}"


_NUMBERS = rules(
    (
        r"(?i)(?:\\text\{ ?)?\bper ?cent(?:age)?(?: points?)?\b(?: ?\})?|\\text\{ ?pct ?\}",
        r"\\%",
    ),
    (r"(?<!\\)%", r"\\%"),
    (r"(\d+\.\d+) ?\{e\} ?(?=[+-]?\d)|(\d)\{e\}(?=\d)", r"\1\2e"),  # 2.5\\mathrm{e}3
    (r"(?<![\w.])(\d+) (\d+) ?/ ?(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    (_WHOLE + r"\\(?:overline|bar|dot)\{(?P<period>\d{1,50})\}", _repeating),
    (_WHOLE + r"\((?P<period>\d{1,50})\)", _repeating),
    (_WHOLE + r"(?P<period>\d{1,6})(?P=period){2,}\s*\\ldots", _repeating),
    (r"(?<![\d\w}])\.(?=\d)", "0."),
    (r"(\d+(?:\.\d+)?)\\degree ?(\d+(?:\.\d+)?)'(?!') ?(?:(\d+(?:\.\d+)?)'')?", _arc),
    (r"^\+ ?(?=[\d.\\])", ""),
    *(
        _power(*item)
        for item in zip(
            ["hundred", "thousand", "million", "billion", "trillion"],
            (2, 3, 6, 9, 12),
            strict=True,
        )
    ),
    (r"\\text\{ *\}", ""),
)


def spell(text: str, thousands: bool = True) -> str:
    r"""The answer in the one spelling that the next modules read.

    Every argument has its braces, words are `\text{...}`, a degree is `\degree `, primes
    are `'`, lists are separated by ", ", thousands by nothing; without `thousands`, 1,234
    is a list.
    """
    text = text.replace("...", r"\ldots ").translate(_CHARACTERS)
    # After 5² has become 5^{2}: this would make it 52.
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    dollars = re.findall(r"(?<!\\)\$", text)
    if len(dollars) % 2 == 0:  # around mathematics, not before an amount
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = without_group(apply(_ENDS, apply(_LAYOUT, text)))
    text = close_set(apply(_SYNONYMS, text))
    text = _unify_fonts(brace_arguments(text))
    text = re.sub(r"\s+", " ", text).strip()
    for table in (_FILLERS, _NOUNS, _FAMILIES):
        text = apply(table, text).strip()
    text = _join_thousands(text) if thousands else text
    text = without_group(apply(_ENDS, apply(_NUMBERS, apply(_SEPARATORS, text))))
    return re.sub(r"\s+", " ", text).strip()


def _unify_fonts(text: str) -> str:
    r"""Fonts removed: mathematics as it is, a function as `\ln `, words as `\text{...}`."""
    for match in reversed(list(_FONTS.finditer(text))):  # from the innermost
        end = group_end(text, match.end() - 1)
        content = text[match.end() : end - 1]
        text = text[: match.start()] + _unify_font(match, content) + text[end:]
    return text


def _unify_font(match: re.Match[str], content: str) -> str:
    content = re.sub(
        r"(?<!\\)\$|(?<=\^)\{(-?\d)\}", r"\1", re.sub(r"\s+", " ", content)
    )
    bare = content.strip(" .")
    before = match.string[: match.start()]
    is_unit = bare in _UNIT_OR_FUNCTION and re.search(r"[\d}] *$", before)
    if bare in _FUNCTIONS and not is_unit:
        return bare if before.endswith("_{") else rf"\{bare} "
    if match[0].startswith(r"\operatorname"):
        return bare if len(bare) == 1 else rf"\operatorname{{{content}}}"
    if bare in ("e", "i", "d"):
        return f"{{{bare}}}" if bare == "e" else bare
    if match["math"]:
        return f" {content}" if content[:1].isalpha() else content
    if not re.search("[a-zA-Z]", bare):
        return content
    if r"\text" in content or (_MATH.search(bare) and not _UNIT_LIKE.fullmatch(bare)):
        return content
    parts = re.split(r"((?<![\w^.])(?<!\^-)\d+(?:[.,]\d+)*(?!\w)|[,;])", content)
    return "".join(map(_words, parts))


def _words(part: str) -> str:
    """A part of a text: a number and a comma as mathematics, words as one command."""
    if not re.search("[a-zA-Z]", part):
        return part
    items = re.split(
        r"\b(?:and|or|&)\b(?! (?:more|less|fewer|above|below|over|under|not)\b)", part
    )
    if len(items) > 1 and not DECIDING.search(" ".join(items)):
        return ", ".join(map(_words, items)) or part
    return rf" \text{{{part.strip()}}} "


def _join_thousands(text: str) -> str:
    """1,234 and 1 234 as 1234, but not in brackets, where a comma parts elements."""
    out, depth, end = [], 0, 0
    for match in re.finditer(rf"[(\[]|\\\{{|[)\]]|\\\}}|{_GROUPS}", text):
        if match[1] is None:
            depth += 1 if match[0][-1] in "([{" else -1
        elif depth == 0 or "," not in match[1]:
            out += [text[end : match.start()], re.sub(r"\D", "", match[1])]
            end = match.end()
    return "".join(out) + text[end:]
