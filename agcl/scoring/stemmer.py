"""Porter's stemmer (Porter 1980, "An algorithm for suffix stripping"), with NLTK's extensions.

`rouge_score`, by which the literature reports ROUGE-L, stems like this (`NLTK_EXTENSIONS`).
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise

Condition = Callable[[str], bool]
"""On the stem that is left without the suffix."""
Rule = tuple[str, str, Condition]

_IRREGULAR = {
    "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "innings": "inning",
    "outings": "outing", "cannings": "canning",
    **{word: word for word in "sky news inning outing canning howe proceed exceed succeed".split()},
}  # fmt: skip


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """The stem of a lowercase word."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _past, _final_y, _double_suffix, _suffix, _last_suffix, _final_e):
        word = step(word)
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


def _is_consonant(word: str, i: int) -> bool:
    if word[i] == "y":
        return i == 0 or not _is_consonant(word, i - 1)
    return word[i] not in "aeiou"


def _measure(stem: str) -> int:
    """Porter's m: the number of changes from a vowel to a consonant."""
    kinds = [_is_consonant(stem, i) for i in range(len(stem))]
    return sum(not a and b for a, b in pairwise(kinds))


def _several(stem: str) -> bool:
    return _measure(stem) > 1


def _positive(stem: str) -> bool:
    return _measure(stem) > 0


def _has_vowel(stem: str) -> bool:
    return not all(_is_consonant(stem, i) for i in range(len(stem)))


def _is_short(stem: str) -> bool:
    """Whether it ends with consonant, vowel, consonant (not w, x, y), or is vowel, consonant."""
    kinds = [_is_consonant(stem, i) for i in range(len(stem))]
    if kinds == [False, True]:
        return True
    return kinds[-3:] == [True, False, True] and stem[-1] not in "wxy"


def _apply(word: str, rules: Iterable[Rule]) -> str:
    """The first rule whose suffix the word has decides, also if its condition fails."""
    for suffix, new, condition in rules:
        if word.endswith(suffix):
            rest = word[: len(word) - len(suffix)]
            return rest + new if condition(rest) else word
    return word


def _rules(table: str, condition: Condition) -> tuple[Rule, ...]:
    """From pairs such as `sses>ss`."""
    pairs = (each.split(">") for each in table.split())
    return tuple((suffix, new, condition) for suffix, new in pairs)


_PLURALS = _rules("sses>ss ies>i ss>ss s>", lambda stem: True)
_DOUBLE = (
    *_rules(
        "ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble alli>al entli>ent eli>e "
        "ousli>ous ization>ize ation>ate ator>ate alism>al iveness>ive fulness>ful ousness>ous "
        "aliti>al iviti>ive biliti>ble fulli>ful",
        _positive,
    ),
    ("logi", "log", lambda rest: _positive(f"{rest}l")),
)
_SUFFIXES = _rules("icate>ic ative> alize>al iciti>ic ical>ic ful> ness>", _positive)
_LAST = (
    *_rules("al> ance> ence> er> ic> able> ible> ant> ement> ment> ent>", _several),
    ("ion", "", lambda rest: _several(rest) and rest[-1] in "st"),
    *_rules("ou> ism> ate> iti> ous> ive> ize>", _several),
)


def _plural(word: str) -> str:
    if len(word) == 4 and word.endswith("ies"):
        return word[:-1]
    return _apply(word, _PLURALS)


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _positive(word[:-3]) else word
    for suffix in ("ed", "ing"):
        rest = word.removesuffix(suffix)
        if rest != word and _has_vowel(rest):
            break
    else:
        return word
    if rest.endswith(("at", "bl", "iz")):
        return f"{rest}e"
    doubled = len(rest) > 1 and rest[-1] == rest[-2] and _is_consonant(rest, len(rest) - 1)
    if doubled:
        return rest if rest[-1] in "lsz" else rest[:-1]
    return f"{rest}e" if _measure(rest) == 1 and _is_short(rest) else rest


def _final_y(word: str) -> str:
    long = len(word) > 2 and _is_consonant(word, len(word) - 2)
    return f"{word[:-1]}i" if word.endswith("y") and long else word


def _double_suffix(word: str) -> str:
    if word.endswith("alli") and _positive(word[:-4]):
        return _double_suffix(word[:-2])
    return _apply(word, _DOUBLE)


def _suffix(word: str) -> str:
    return _apply(word, _SUFFIXES)


def _last_suffix(word: str) -> str:
    return _apply(word, _LAST)


def _final_e(word: str) -> str:
    rest = word[:-1]
    if not word.endswith("e"):
        return word
    return rest if _several(rest) or (_measure(rest) == 1 and not _is_short(rest)) else word
