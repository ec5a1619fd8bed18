r"""Is an answer equivalent to an accepted one? math-verify, between tables of ours.

1. `spelling` takes typography away.
2. Choices, words, lists, equations and percent are taken apart here, `units` takes
   units off, and the values that remain are compared one by one.
3. `marks` writes a value so that the parser drops nothing.
4. `agreement` parses both sides and compares them by math-verify.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

import sympy.core.random

from e1jax.rewards.agreement import equal, is_number, parse, same_rounded
from e1jax.rewards.marks import IMAGINARY, mark_pair, marked, marks_of, name_parameter
from e1jax.rewards.spelling import spell
from e1jax.rewards.tex import apply, elements, rules
from e1jax.rewards.units import conversion, is_angle, join_sums, split_unit

# A letter of a multiple-choice answer, and the value that may stand behind it.
_CHOICE = re.compile(
    r"\\text\{\(?([A-J])\)?[.:]?\}(?:[.:)])?\s*((?!,).*)"
    r"|\(([A-J])\)\s*((?!,).*)|([A-J])[.:)]\s*((?!,).*)|\[?([A-J])\]?()",
    re.DOTALL,
)
_LETTER = r"(?:\\(?:vec|hat)\{[a-zA-Z]\}|(?<![a-zA-Z\\])[a-zA-Z])"
_PRODUCT = re.compile(
    rf"{_LETTER}\s*\\(cdot|times)(?![a-z])\s*(?={_LETTER}(?![a-zA-Z]))"
)
_MOST_SIDES = 4  # of an answer that is a chain of equations
_EXACT = 40  # decimal places
_MOST_ELEMENTS = 30  # of lists that are matched element by element

_NAMED = re.compile(r"^[a-zA-Z] ?= ?(\\\{.*\\\}|[(\[].*[)\]])$")  # S = \{1, 2\}
_NAMED_TUPLE = re.compile(r"\(([^()]*)\) ?= ?\((.*)\)")
# Forms of sets and of their members that say the same.
_FORMS = rules(
    # {x | x < 3} is its condition.
    (
        r"^\\\{ ?([a-z])(?: ?\\in ?\\mathbb\{R\})? ?(?:\\mid|\\vert|:|\|) ?(.*\1.*)\\\}$",
        r"\2",
    ),
    (r"^[a-zA-Z](?:\([a-z]\))? ?\\in ?(?=[\[(]|\\\{|\\mathbb)", ""),
)


def equivalent(answer: str, accepted: str) -> bool:
    """True if the answer is equal in value to the accepted one, and says nothing else.

    Both are LaTeX or plain text. It can take any time and memory: call it in a worker.
    """
    sympy.core.random.seed(0)  # SymPy tests some equalities at random points
    texts = spell(answer), spell(accepted)
    if _equivalent(*texts):
        return True
    # 120,150 is a list where a list is accepted.
    is_list = len(elements(texts[1])) > 1 or texts[1].startswith("(")
    listed = spell(answer, thousands=False), texts[1]
    return (
        is_list and listed != texts and ", 0" not in listed[0] and _equivalent(*listed)
    )


def _equivalent(answer: str, accepted: str) -> bool:
    letter, answer = _choice(answer)
    accepted_letter, accepted = _choice(accepted)
    if letter and accepted_letter and letter != accepted_letter:
        return False
    if not answer or not accepted:
        return bool(letter) and letter == accepted_letter
    if _same_text(answer, accepted):
        return True
    products = [set(_PRODUCT.findall(text)) for text in (answer, accepted)]
    if all(products) and products[0] != products[1]:  # u \cdot v and u \times v
        return False
    answer, accepted = map(_without_brackets, map(join_sums, (answer, accepted)))
    answer, accepted = _spread(answer), _spread(accepted)
    if ("=" in answer) != ("=" in accepted):
        answer, accepted = (_NAMED.sub(r"\1", text) for text in (answer, accepted))
    answer, accepted = mark_pair(answer, accepted)
    return _same_list(
        *(name_parameter(apply(_FORMS, text)) for text in (answer, accepted))
    )


def _choice(text: str) -> tuple[str, str]:
    r"""`\text{(D)} 21` as D and 21; no letter for an answer that has none."""
    match = _CHOICE.fullmatch(text)
    if match is None:
        return "", text
    letter, value = (part for part in match.groups() if part is not None)
    if _CHOICE.fullmatch(value):  # (A)(B): several choices are none
        return "", text
    return letter, value


def _without_brackets(text: str) -> str:
    """(5) as 5, but neither a pair nor an interval."""
    inner = re.fullmatch(r"\(([^()\[\],;]*)\)", text)
    return inner[1] if inner else text


def _spread(text: str) -> str:
    """(x, y) = (1, 2) as x = 1, y = 2."""
    match = _NAMED_TUPLE.fullmatch(text)
    names, values = (elements(part) for part in match.groups()) if match else ([], [])
    if not names or len(names) != len(values):
        return text
    return ", ".join(
        f"{name}={value}" for name, value in zip(names, values, strict=True)
    )


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
    items = [
        re.sub(r"(?<=[a-z]{3})-(?=[a-z]{3})|\s+", "", item)
        for item in re.split(r"[,;]|\b(?:and|or)\b", plain)
    ]
    items = [item.removesuffix("s") for item in items if item]
    if not items or not all(re.fullmatch(r"[^\W\d_][\w'.]+", item) for item in items):
        return None
    return sorted(items)


def _same_list(answer: str, accepted: str) -> bool:
    r"""Element by element, in any order; `1 \pm 2` has two elements."""
    found, wanted = _expanded(answer), _expanded(accepted)
    if (r"\cup" in answer) != (r"\cup" in accepted):
        # A union is a list of inequalities, but not of sets or letters.
        others = wanted if r"\cup" in answer else found
        if not all(re.search(r"[<>=]|\\[lg]e(?![a-z])", other) for other in others):
            return _same_element(answer, accepted)
    if len(found) != len(wanted):
        return _same_tuple(found, answer, wanted, accepted) or (
            r"\cup" in answer + accepted and _same_element(answer, accepted)
        )
    if len(wanted) == 1:
        return _same_element(found[0], wanted[0])
    if len(wanted) > _MOST_ELEMENTS:
        return False
    if len(_names(wanted)) == len(wanted) and not _names(
        found
    ):  # x=3, y=4 has an order
        return all(map(_same_element, found, wanted))
    return _match(found, wanted, _same_element) or (
        r"\cup" in answer and r"\cup" in accepted and _same_element(answer, accepted)
    )


def _match(
    found: list[str], wanted: list[str], same: Callable[[str, str], bool]
) -> bool:
    """Has each element a partner of its own? 5 % is equal to 5 and to 0.05, so a partner
    that is taken may have to move on (augmenting paths of bipartite matching)."""
    fits = functools.cache(lambda one, other: same(found[one], wanted[other]))
    partner: dict[int, int] = {}  # of each wanted element

    def place(one: int, seen: set[int]) -> bool:
        # Equal texts first: a list in another order then takes no n^2 comparisons.
        order = sorted(range(len(wanted)), key=lambda i: wanted[i] != found[one])
        for other in order:
            if other not in seen and fits(one, other):
                seen.add(other)
                if other not in partner or place(partner[other], seen):
                    partner[other] = one
                    return True
        return False

    return all(place(one, set()) for one in range(len(found)))


def _same_tuple(
    found: list[str], answer: str, wanted: list[str], accepted: str
) -> bool:
    """(3, 4), x=3, y=4 and 3, 4 where one side has brackets and the other has none."""
    if len(wanted) == 1 and accepted.startswith("(") and not _names(wanted):
        values = [_equation(part)[-1] for part in found]
        return _same_element(f"({', '.join(values)})", accepted)
    if (
        len(found) == 1
        and answer.startswith("(")
        and len(_names(wanted)) in (0, len(wanted))
    ):
        values = [_equation(part)[-1] for part in wanted]
        return _same_element(answer, f"({', '.join(values)})")
    return False


def _expanded(text: str) -> list[str]:
    r"""The elements of a list, with both signs of every `\pm`."""
    expanded = []
    for element in elements(text):
        signs = re.findall(r"\\(?:pm|mp)(?![a-z])", element)
        if not signs or len(signs) > 3:
            expanded.append(element)
            continue
        free = element.startswith("(")  # the signs of coordinates are independent
        for choice in itertools.product("+-", repeat=len(signs) if free else 1):
            chosen = iter(choice if free else choice * len(signs))
            expanded.append(_signed(element, chosen))
    return expanded


def _signed(element: str, signs: Iterator[str]) -> str:
    def sign(match: re.Match[str]) -> str:
        chosen = next(signs)
        return chosen if match[1] == "pm" else {"+": "-", "-": "+"}[chosen]

    text = re.sub(r"\\(pm|mp)(?![a-z]) ?", sign, element)
    return re.sub(r"(^|[(,] ?)\+", r"\1", text)


def _equation(text: str) -> list[str]:
    """The sides of a chain of equations; equations within brackets do not count."""
    sides, depth, start = [], 0, 0
    for match in re.finditer(r"\\[{}]|[(\[{)\]}]|(?<![<>!])=|\\approx(?![a-z])", text):
        if match[0] in ("=", r"\approx"):
            if depth == 0:
                sides.append(text[start : match.start()].strip())
                start = match.end()
        else:
            depth += 1 if match[0][-1] in "([{" else -1
    return [*sides, text[start:].strip()]


def _names(equations: list[str]) -> set[str]:
    """The different left sides that only name a value."""
    sides = [_equation(text) for text in equations]
    return {side[0] for side in sides if len(side) > 1 and _is_name(side[0])}


def _is_name(side: str) -> bool:
    """x, f(2), AB or a_1 + b_1, but neither 2x nor -x nor a number."""
    bare = re.sub(r"_\{[^{}]*\}|\^\{\d\}|\([^()]*\)", "", side)
    return bool(re.search("[a-zA-Z]", bare)) and not re.search(r"\d|^-", bare)


def _same_element(answer: str, accepted: str) -> bool:
    sides, accepted_sides = _equation(answer), _equation(accepted)
    if len(accepted_sides) == 1:
        return any(_same_value(value, accepted) for value in _values(sides))
    if len(sides) == 1:
        # x + y = 5 and xy = 1 are more than 5 and 1; AB = 5 is not.
        name = accepted_sides[0]
        named = _is_name(name) and not re.search(r"[-+]|^[a-z]{2,}$", name)
        return named and _same_value(answer, accepted_sides[-1])
    return _same_value(answer, accepted)


def _values(sides: list[str]) -> list[str]:
    r"""The values that a chain of equations states; none if it contradicts itself.

    That is the last side, or, of numbers (`\frac{17}{3} \approx 5.67`), each of them: all
    must be equal to the first, or round to one another. Longer chains are no answer: they
    could run through many numbers.
    """
    if len(sides) == 1:
        return sides
    values = sides[1:] if _is_name(sides[0]) else sides
    if len(values) > _MOST_SIDES:
        return []
    parsed = [parse(marked(split_unit(side)[0]), True, True) for side in values]
    if not all(map(is_number, parsed)):
        return [] if values is sides else values[-1:]
    places = [len(part[1]) for side in values if (part := re.search(r"\.(\d+)", side))]
    digits = min(places, default=_EXACT)
    agree = all(same_rounded(parsed[0], other, digits) for other in parsed[1:])
    return values if agree else []


def _same_value(answer: str, accepted: str) -> bool:
    bare, unit = split_unit(answer)
    accepted_bare, accepted_unit = split_unit(accepted)
    if unit is None and not re.search(r"[a-zA-Z]", accepted):
        bare = re.sub(r"(?<=\d) ?(?:[mgshLNJWKVAC])$", "", bare)  # 12 m for 12
    factor = conversion(unit, accepted_unit)
    # `2 s` may be two seconds or twice s.
    plain = r"\text" not in answer + accepted
    if plain and _same_readings(answer, accepted, Fraction(1)):
        return True
    if factor is None:
        return False
    if is_angle(accepted_unit) and unit is None and r"\pi" in bare:
        bare = rf"\frac{{180}}{{\pi}} \cdot ({bare})"
    if is_angle(unit) and accepted_unit is None and r"\pi" in accepted_bare:
        bare = rf"\frac{{\pi}}{{180}} \cdot ({bare})"
    return _same_readings(bare, accepted_bare, factor)


_PERCENT = re.compile(r"(?<!%)\s*\\%(?!\s*\\?%|\d)")
_PERCENT_NUMBER = re.compile(
    r"((?:\d|\.|\\frac\{[^{}]*\}\{[^{}]*\}| (?=\\frac))+)\s*\\%(?!\s*\\?%)"
)
_EULER = re.compile(r"(?<![\w.\\{}])([2-9]\d*)e([+-]\d)(?![\d.e])")
_SCIENTIFIC = re.compile(r"(?<![\w\\])(\d+(?:\.\d*)?) ?[eE]([+-]?\d+)(?![\d.a-zA-Z])")


def _same_readings(answer: str, accepted: str, factor: Fraction) -> bool:
    return any(
        _same_reading(one, other, factor) for one, other in _readings(answer, accepted)
    )


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
    if _is_word(answer) and _is_word(accepted):
        return answer.casefold() == accepted.casefold()
    answer, accepted = marked(answer), marked(accepted)
    if marks_of(answer) != marks_of(accepted):
        return False
    if _without_spaces(answer) == _without_spaces(accepted):
        return factor == 1
    if factor != 1:
        answer = (
            rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({answer})"
        )
    fold = not (_has_both_cases(answer) or _has_both_cases(accepted))
    # A real variable is never equal to 1 + i.
    real = IMAGINARY not in answer + accepted
    found, target = parse(answer, fold, real), parse(accepted, fold, real)
    return found is not None and target is not None and equal(found, target)


def _is_word(text: str) -> bool:
    """`east`, which is no product of four variables; `abc` may be one of three."""
    letters = sorted(text.casefold())
    consecutive = (
        ord(letters[-1]) - ord(letters[0]) == len(letters) - 1 if letters else True
    )
    return (
        bool(
            re.fullmatch(r"[A-Za-z][a-z]{2,}", text) and re.search("(?i)[aeiou]", text)
        )
        and not consecutive
    )


def _has_both_cases(text: str) -> bool:
    """Are R and r two variables here? Elsewhere they are one."""
    letters = set(
        re.findall("[a-zA-Z]", re.sub(r"\\variable\{\w+\}|\\[a-zA-Z]+", "", text))
    )
    return len(letters) > len({letter.lower() for letter in letters})
