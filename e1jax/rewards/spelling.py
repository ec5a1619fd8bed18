r"""One spelling for LaTeX answers that say the same: fonts, spaces, arguments, numbers.

`spell` runs the tables of this file from top to bottom. They remove typography alone:
no rule changes the value of an answer or drops a mark that bears meaning. A text of
several words stays `\text{...}`; `e1jax.rewards.units` and `.equivalence` read those.
"""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def _rules(*table: tuple[str, str | Callable[[re.Match[str]], str]]) -> list[Rule]:
    return [(re.compile(pattern), new) for pattern, new in table]


def apply(rules: list[Rule], text: str) -> str:
    """The text after every (pattern, replacement) of a table, in order."""
    for pattern, new in rules:
        text = pattern.sub(new, text)
    return text


# Characters that plain text has in place of commands. NFKC comes after these: it would
# make 5² into 52.
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—", "-"),
        **{"×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*"},
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm "},
        **{
            "∞": r"\infty ",
            "π": r"\pi ",
            "√": r"\sqrt",
            "°": r"\degree ",
            "∠": r"\angle ",
        },
        **{
            "∈": r"\in ",
            "∪": r"\cup ",
            "∩": r"\cap ",
            "∅": r"\emptyset ",
            "…": r"\ldots ",
        },
        **{"′": "'", "″": "''", "’": "'", "‘": "'", "“": '"', "”": '"'},
        **{"½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}"},
        **{"¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "、": ",", "。": "."},
        **{s: f"^{{{i}}}" for i, s in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
        **{s: f"_{{{i}}}" for i, s in enumerate("₀₁₂₃₄₅₆₇₈₉")},
    }
)

# Marks that LaTeX and Markdown put around an answer, and spaces of every width.
_LAYOUT = _rules(
    (r"\\(?:left|right)\s*\.", ""),  # an invisible delimiter
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*", ""),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\[hv](?:space|skip)\*?\s*\{[^{}]*\}|\\[hv]?phantom\s*\{[^{}]*\}", " "),
    (
        r"\\(?:q?quad|(?:neg)?(?:thin|med|thick)space|ens(?:pace|kip)|hfill)(?![a-zA-Z])",
        " ",
    ),
    (r"(?<!\\)\\!", ""),
    (r"~|(?<!\\)\\(?:[,;:> ]|\n)", " "),
    (r"\{[ ]*\}", ""),
    (r"\\(?:text)?color\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}", ""),
    (
        r"\\(?:display|text|script)style(?![a-zA-Z])"
        r"|\\(?:bf|rm|it|sf|tt|em|tiny|small|large|Large|LARGE|huge|Huge|normalsize"
        r"|boldmath|limits|nolimits|centering|checkmark|blacksquare|square)(?![a-zA-Z])",
        " ",
    ),
    (r"\\[()\[\]]|\$\$", " "),  # \( \) \[ \] and $$ around mathematics
    (r"\s+", " "),
)

# Synonyms among commands.
_SYNONYMS = _rules(
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
    (r"\\(?:le(?:q|qq|qslant)?)(?![a-zA-Z])|<=", r"\\le "),
    (r"\\(?:ge(?:q|qq|qslant)?)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\neq?(?![a-zA-Z])|!=", r"\\ne "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\colon(?![a-zA-Z])", ":"),
    (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"^([^{}]*)\\choose(?![a-zA-Z])([^{}]*)$", r"\\binom{\1}{\2}"),
    (r"\\(?:cdotp|ast)(?![a-zA-Z])|(?<=[\d}])\s*\*\s*(?=[\d\\])", r"\\cdot "),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
    (r"\\(?:[lch]?dots[cbmio]?)(?![a-zA-Z])", r"\\ldots "),
    (r"\\(?:varnothing|O)(?![a-zA-Z])", r"\\emptyset "),
    (r"\\(?:R|reals|Reals)(?![a-zA-Z])", r"\\mathbb{R}"),
    (r"\\([ZNQC])(?![a-zA-Z])", r"\\mathbb{\1}"),
    (r"\\(?:prime)(?![a-zA-Z])", "'"),
    (r"\^\s*(?:\{\s*((?:'\s*)+)\}|('))", r"\1\2"),
    (r"(?<=')\s+(?=')", ""),
    (r"\\operatorname\s*\*", r"\\operatorname"),
    (r"\^\s*\{?\s*\\circ(?![a-zA-Z])\s*\}?", r"\\degree "),
    (
        r"\^\s*\{?\s*\\(?:text|mathrm)\s*\{\s*o\s*\}\s*\}?|\^\s*(?:\{o\}|o(?![a-z]))",
        r"\\degree ",
    ),
    (r"\\degrees?(?![a-zA-Z])\s*", r"\\degree "),
    (r"\^\s*\\degree", r"\\degree"),
    (r"\\degree \\(?:text|mathrm)\s*\{\s*([CF])\s*\}", r"\\degree \1"),
    (
        r"(?<=\\in)\s*(?:\\math\w+\s*|\\bf\s*)?\{?\s*([ZRNQC])\s*\}?(?![A-Za-z])",
        r" \\mathbb{\1}",
    ),
)

# How many arguments a command takes; each gets its braces.
_ARGUMENTS = {
    **dict.fromkeys(("frac", "binom"), 2),
    **dict.fromkeys(
        ("sqrt", "dot", "ddot", "vec", "hat", "bar", "tilde", "widehat"), 1
    ),
    **dict.fromkeys(
        ("overline", "underline", "overrightarrow", "mathbb", "mathcal"), 1
    ),
    **dict.fromkeys(
        ("mathrm", "mathbf", "mathit", "mathsf", "mathtt", "mathnormal"), 1
    ),
    **dict.fromkeys(("boldsymbol", "bm", "pmb", "operatorname", "boxed", "fbox"), 1),
    **dict.fromkeys(("text", "textbf", "textit", "textrm", "textsf", "texttt"), 1),
    **dict.fromkeys(("textnormal", "textup", "emph", "mbox", "hbox"), 1),
}
_COMMAND = re.compile(rf"\\({'|'.join(sorted(_ARGUMENTS, reverse=True))})(?![a-zA-Z])")
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[^\\]", re.DOTALL)
# People write 10^10 and x^-1 where TeX would take one character.
_SCRIPT = re.compile(
    rf"([\^_])\s*([-+]?(?:\d+(?:\.\d+)?|[a-zA-Z]|(?!{_COMMAND.pattern})\\[a-zA-Z]+))"
)

_FONTS = re.compile(
    r"\\(?:math(?:rm|bf|it|sf|tt|normal)|boldsymbol|bm|pmb|operatorname|emph|mbox|hbox|underline"
    r"|text(?:bf|it|rm|sf|tt|normal|up)?|boxed|fbox)\{((?:[^{}]|\{[^{}]*\})*)\}"
)
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
        "lg",
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
        "mod",
        "sgn",
        "floor",
        "ceil",
    ]
)

# Words that only introduce an answer, repeat that it is one, or explain it.
_FILLERS = _rules(
    (
        r"(?i)\\text\{(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final )?"
        r"(?:answers?|results?|solutions?|value)(?: is| are)? ?[:=]?\}",
        " ",
    ),
    (r"(?i)^(?:the )?(?:final )?answer(?: is)? ?[:=]?\s+(?=\S)", ""),
    (
        r"(?i)\\text\{(?:is|are) (?:the )?(?:final |correct )?(?:answers?|solutions?|correct)\.?\}",
        " ",
    ),
    (r"(?i)\\text\{[(,]? ?(?:since|because)\b.*$", ""),
    (r"(?i)\\text\{(?:is|are|an?) (?=\w)", r"\\text{"),
    (r"(?i)^\\text\{(?:approximately|about|roughly)\}", " "),
    (r"\\text\{[ .;:]*\}", " "),
)

_SEPARATORS = _rules(
    (r"\{ ?, ?\}", ","),
    (r"\s*,?\s*\\text\{ ?,? ?(?:and|or) ?,? ?\}\s*,?\s*", ", "),
    (r"\s*,?\s*(?<![a-zA-Z\\{])(?:and|or)(?![a-zA-Z])\s*,?\s*", ", "),
    (r"\s*([,;])[\s,;]*", r"\1 "),
)

_GROUPS = r"(?<![\d.,])(\d{1,3}(?:(?:,| |\{ ?, ?\})\d{3})+)(?!\d|,\d)"
_WHOLE = r"(?P<whole>\d*)\.(?P<fixed>\d*?)"


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


_POWERS = (
    *(
        ("hundred", r"\\cdot 10^{2}\\text{\1}"),
        ("thousand", r"\\cdot 10^{3}\\text{\1}"),
    ),
    *(("million", r"\\cdot 10^{6}\\text{\1}"), ("billion", r"\\cdot 10^{9}\\text{\1}")),
    ("trillion", r"\\cdot 10^{12}\\text{\1}"),
)
_NUMBERS = _rules(
    (
        r"(?i)(?:\\text\{ ?)?\bper ?cent(?:age)?(?: points?)?\b(?: ?\})?|\\text\{ ?pct ?\}",
        r"\\%",
    ),
    (r"(?<!\\)%", r"\\%"),
    (r"(?<![\w.])(\d+) (\d+) ?/ ?(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    (_WHOLE + r"\\(?:overline|bar|dot)\{(?P<period>\d+)\}", _repeating),
    (_WHOLE + r"\((?P<period>\d+)\)", _repeating),
    (_WHOLE + r"(?P<period>\d{1,6})(?P=period){2,}\s*\\ldots", _repeating),
    (r"(?<![\d\w}])\.(?=\d)", "0."),
    (r"(\d+(?:\.\d+)?)\\degree ?(\d+(?:\.\d+)?)'(?!') ?(?:(\d+(?:\.\d+)?)'')?", _arc),
    (r"^\+ ?(?=[\d.\\])", ""),
    *(
        (
            rf"(?i)(?<=[\d}}]) ?(?:\\text\{{ ?{word} ?([^{{}}]*)\}}|{word}(?![a-z]))",
            power,
        )
        for word, power in _POWERS
    ),
)

_ENDS = _rules(
    (r"^[\s\"`*]+|[\s\"`*]+$", ""),
    (r"^'([^']*)'$", r"\1"),
    (r"\\+$", ""),
    (r"^(?:=|\\approx(?![a-z])|\\equiv(?![a-z]))\s*", ""),
    (r"(?<![.\s])[\s.;:,]+$", ""),
    (r"^\{((?:[^{}]|\{[^{}]*\})*)\}$", r"\1"),
)


def spell(text: str) -> str:
    r"""The answer in the one spelling that `units` and `equivalence` read.

    Every argument has its braces, several letters that are no mathematics are
    `\text{...}`, a degree is `\degree `, primes are `'`, lists are separated by ", ",
    thousands by nothing.
    """
    text = text.replace("...", r"\ldots ").translate(_CHARACTERS)
    text = unicodedata.normalize("NFKC", text)
    text = apply(_ENDS, apply(_LAYOUT, text))
    text = _close_set(apply(_SYNONYMS, text))
    text = _unify_fonts(_brace_arguments(text))
    text = apply(_FILLERS, re.sub(r"\s+", " ", text).strip())
    text = _join_thousands(text)
    text = apply(_ENDS, apply(_NUMBERS, apply(_SEPARATORS, text)))
    return re.sub(r"\s+", " ", text).strip()


def _close_set(text: str) -> str:
    r"""Closes `\{1, 2`, left open where `\right.` stood for the brace."""
    return text + r"\}" * (text.count(r"\{") - text.count(r"\}"))


def _brace_arguments(text: str) -> str:
    r"""`\frac1e` as `\frac{1}{e}`, `x_0` as `x_{0}`."""
    for match in reversed(list(_COMMAND.finditer(text))):
        text = _brace(text, match.end(), _ARGUMENTS[match[1]])
    return _SCRIPT.sub(r"\1{\2}", text)


def _brace(text: str, place: int, count: int) -> str:
    """The text with braces around the `count` arguments that begin at `place`."""
    for _ in range(count):
        rest = text[place:].lstrip()
        if rest.startswith("["):  # the degree of a root
            degree, bracket, rest = rest.partition("]")
            text = text[:place] + degree + bracket + rest
            place += len(degree + bracket)
            rest = rest.lstrip()
        if not rest.startswith("{"):
            token = _TOKEN.match(rest)
            if token is None or token[0] == "(":  # \\sqrt(2)
                break
            end = token.end()
            if _COMMAND.fullmatch(token[0]):  # its own arguments have braces already
                for _ in range(_ARGUMENTS[token[0][1:]]):
                    end = _group_end(rest, end)
            rest = f"{{{rest[:end]}}}{rest[end:]}"
        text = text[:place] + rest
        place += _group_end(rest, 0)
    return text


def _group_end(text: str, start: int) -> int:
    """The place behind the brace that closes the one at `start`, or the text's end."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return match.end()
    return len(text)


def _unify_fonts(text: str) -> str:
    r"""Fonts removed: mathematics as it is, a function as `\ln `, words as `\text{...}`."""
    return _FONTS.sub(_unify_font, text)


def _unify_font(match: re.Match[str]) -> str:
    content = re.sub(
        r"\s+", " ", re.sub(r"\$|(?<=\^)\{(-?\d)\}", r"\1", _unify_fonts(match[1]))
    )
    bare = content.strip(" .")
    if bare in _FUNCTIONS:
        return rf"\{bare} "
    if match[0].startswith(r"\operatorname") or bare in ("e", "i", "d"):
        return bare if len(bare) == 1 else match[0]
    if not re.search("[a-zA-Z]", bare) or "\\" in content:
        return content
    # Numbers among the words are mathematics: \text{5 or 6}.
    parts = re.split(r"((?<![\w^.])(?<!\^-)\d+(?:[.,]\d+)*(?![\w]))", content)
    return "".join(
        part if i % 2 else rf" \text{{{part.strip()}}} " if part.strip() else part
        for i, part in enumerate(parts)
    )


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
