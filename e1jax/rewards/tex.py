"""The grammar of TeX as far as answers need it: arguments, groups, elements of a list."""

import re
from collections.abc import Callable

Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def rules(*table: tuple[str, str | Callable[[re.Match[str]], str]]) -> list[Rule]:
    """A table of (pattern, replacement); `(?!A)` in a pattern ends a command's name."""
    return [
        (re.compile(old.replace("(?!A)", "(?![a-zA-Z])")), new) for old, new in table
    ]


def apply(table: list[Rule], text: str) -> str:
    """The text after every replacement of a table, in order."""
    for pattern, new in table:
        text = pattern.sub(new, text)
    return text


# How many arguments a command takes; each gets its braces.
_ARGUMENTS = {"frac": 2, "binom": 2} | dict.fromkeys(
    [
        "sqrt",
        "dot",
        "ddot",
        "vec",
        "hat",
        "bar",
        "tilde",
        "widehat",
        "overline",
        "underline",
        "overrightarrow",
        "mathbb",
        "mathcal",
        "mathrm",
        "mathbf",
        "mathit",
        "mathsf",
        "mathtt",
        "mathnormal",
        "boldsymbol",
        "bm",
        "pmb",
        "operatorname",
        "boxed",
        "fbox",
        "text",
        "textbf",
        "textit",
        "textrm",
        "textsf",
        "texttt",
        "textnormal",
        "textup",
        "emph",
        "mbox",
        "hbox",
        "ensuremath",
    ],
    1,
)
_COMMAND = re.compile(rf"\\({'|'.join(sorted(_ARGUMENTS, reverse=True))})(?![a-zA-Z])")
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[^\\]", re.DOTALL)
# People write 10^10 and x^-1 where TeX would take one character.
_SCRIPT = re.compile(
    rf"([\^_])\s*([-+]?(?:\d+(?:\.\d+)?|[a-zA-Z]|(?!{_COMMAND.pattern})\\[a-zA-Z]+))"
)


def elements(text: str) -> list[str]:
    r"""The elements of a spelled list: `1, 2`, `\{1, 2\}`, `(1,2) \cup (3,4)`."""
    text = re.sub(r"^\\\{((?!\\emptyset)(?:(?!\\\{).)+)\\\}$", r"\1", text)
    parts, depth, start = [], 0, 0
    for match in re.finditer(
        r"\\[{}]|\\(?:begin|end)|\\cup(?![a-zA-Z])|[(\[{)\]}]|[,;]", text
    ):
        token = match[0]
        if token in (",", ";", r"\cup"):
            if depth == 0:
                parts.append(text[start : match.start()].strip())
                start = match.end()
        else:
            depth += 1 if token[-1] in "([{n" else -1
    return [*parts, text[start:].strip()]


def without_group(text: str) -> str:
    """`{...}` without its braces."""
    while text.startswith("{") and group_end(text, 0) == len(text) and text[-1] == "}":
        text = text[1:-1].strip()
    return text


def close_set(text: str) -> str:
    r"""Closes `\{1, 2`, left open where `\right.` stood for the brace."""
    return text + r"\}" * (text.count(r"\{") - text.count(r"\}"))


def brace_arguments(text: str) -> str:
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
            if token is None or token[0] in "()":
                break
            end = token.end()
            if _COMMAND.fullmatch(token[0]):  # its own arguments have braces already
                for _ in range(_ARGUMENTS[token[0][1:]]):
                    end = group_end(rest, end)
            rest = f"{{{rest[:end]}}}{rest[end:]}"
        text = text[:place] + rest
        place += group_end(rest, 0)
    return text


def group_end(text: str, start: int) -> int:
    """The place behind the brace that closes the one at `start`, or the text's end."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return match.end()
    return len(text)
