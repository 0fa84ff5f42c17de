"""Scorers: plain functions (prediction, reference) -> number in [0, 1].

A scorer that needs the question has a third parameter, `prompt`.
"""

import importlib
import inspect
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq

from agcl.errors import InputError
from agcl.scoring.stemmer import stem

Scorer = Callable[..., float]
Ngrams = Counter[tuple[str, ...]]
TEACHER_FORCED = "exact_match"
"""The one scorer that needs no generated text: a forward pass decides whether greedy decoding would
produce the answer's tokens (`agcl/scoring/evaluate.py`)."""
RIGHT_OR_WRONG = ("exact_match", "normalised_exact_match", "olora_match")
"""Scorers that score an answer 0 or 1; the others give partial credit."""

# Chinese and Japanese are written without spaces: each character counts as a word.
_SINGLE = r"\u3040-\u30ff\u3400-\u9fff"
_WORDS = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+|[^\w\s]")
_JOINERS = "\u200c\u200d"
"""Within words of Persian and of Indian languages."""
_ASCII_WORDS = re.compile("[a-z0-9]+")
_DASHES = re.compile("[\u2010-\u2015\u2212]")
"""Hyphens, dashes and the minus sign."""
_IN_NUMBER = re.compile(r"(?<=\d)[.,:](?=\d)|(?<!\w)\.(?=\d)|(?<![^\W\d_])-(?=\s*\.?\d)")
"""Punctuation of a number: within it (3.14), before it (.5), its minus."""
_ARTICLES = {"a", "an", "the"}


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are equal except for surrounding whitespace."""
    return float(prediction.strip() == reference.strip())


def normalised_exact_match(prediction: str, reference: str) -> float:
    """1 if both are equal ignoring case, punctuation, and repeated or surrounding whitespace.

    Signs and the punctuation of numbers count: `3.14` is not `314`, nor `-5` `5`, nor `1/2` `12`.
    """
    return float(_normalised(prediction) == _normalised(reference))


def olora_match(prediction: str, reference: str) -> float:
    """1 if both are equal without case, punctuation and whitespace (O-LoRA's benchmark).

    For labels of words: it takes `3.14` for `314`.
    """
    return float(_letters(prediction) == _letters(reference))


def first_character(prediction: str, reference: str) -> float:
    """1 if both start with the same character (TRACE, ScienceQA: the letter of the choice)."""
    return float(prediction.strip()[:1] == reference.strip()[:1])


def token_f1(prediction: str, reference: str) -> float:
    """F1 of words, ignoring case, punctuation and articles (SQuAD, Rajpurkar 2016)."""
    predicted, expected = (
        Counter(word for word in words(text) if word not in _ARTICLES and not _is_punctuation(word))
        for text in (prediction, reference)
    )
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (predicted & expected).total()
    return _f1(shared / predicted.total(), shared / expected.total())


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words."""
    predicted, expected = (
        [word for word in words(text) if not _is_punctuation(word)]
        for text in (prediction, reference)
    )
    if not predicted or not expected:
        return float(predicted == expected)
    common = LCSseq.similarity(predicted, expected)
    return _f1(common / len(predicted), common / len(expected))


def rouge_l_stemmed(prediction: str, reference: str) -> float:
    """ROUGE-L as `rouge_score` computes it with its stemmer, which papers on SuperNI report.

    Words are runs of ASCII letters and digits; those of four and more are stemmed. A text without
    any scores 0.
    """
    predicted, expected = (
        [stem(word) if len(word) > 3 else word for word in _ASCII_WORDS.findall(text.lower())]
        for text in (prediction, reference)
    )
    if not predicted or not expected:
        return 0.0
    common = LCSseq.similarity(predicted, expected)
    return _f1(common / len(predicted), common / len(expected))


def edit_similarity(prediction: str, reference: str) -> float:
    """1 minus insertions and deletions over the total length (TRACE, Py150: `fuzz.ratio`)."""
    return fuzz.ratio(prediction.strip(), reference.strip()) / 100


def sari(prediction: str, reference: str, prompt: str) -> float:
    """SARI of a simplification of `prompt` (Xu 2016, eqs. 3-8), n-grams of 1 to 4 words.

    Mean of the scores for words kept (F1), deleted (precision) and added (F1), each against the
    reference. An empty denominator scores 1, as in Hugging Face's `evaluate`.
    """
    texts = [words(text) for text in (prompt, prediction, reference)]
    return fmean(fmean(_sari_n(*(_ngrams(text, n) for text in texts))) for n in (1, 2, 3, 4))


SCORERS: dict[str, Scorer] = {
    "exact_match": exact_match,
    "normalised_exact_match": normalised_exact_match,
    "olora_match": olora_match,
    "first_character": first_character,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "rouge_l_stemmed": rouge_l_stemmed,
    "sari": sari,
    "edit_similarity": edit_similarity,
}


def scorer_named(name: str, key: str = "scorer") -> Scorer:
    """The scorer of that name, or a custom one given as `package.module:function`.

    Raises `InputError` that starts with the config `key` if there is no such scorer.
    """
    if name in SCORERS:
        return SCORERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise InputError(
            f"{key}: no scorer {name!r} (choose from {', '.join(SCORERS)}, or your own as "
            "package.module:function)"
        )
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # Not a module name, or anything the user's module raises.
        raise InputError(f"{key}: {module!r} cannot be imported ({error})") from None
    found: Any = getattr(imported, function, None)
    if found is None:
        raise InputError(f"{key}: module {module!r} has no function {function!r}")
    try:
        inspect.signature(found).bind("", "", *([""] if _takes_prompt(found) else []))
    except (TypeError, ValueError):
        raise InputError(f"{key}: {name} does not take (prediction, reference)") from None
    return found  # type: ignore[no-any-return]


def score(scorer: Scorer, prediction: str, reference: str, prompt: str) -> float:
    """Score one answer."""
    arguments = (
        (prediction, reference, prompt) if _takes_prompt(scorer) else (prediction, reference)
    )
    return float(scorer(*arguments))


def words(text: str) -> list[str]:
    """Lowercase words, with their combining marks, and punctuation marks."""
    if text.isascii():
        return _WORDS.findall(text.lower())
    return _words_with_marks().findall(unicodedata.normalize("NFC", text.lower()))


@cache
def _words_with_marks() -> re.Pattern[str]:
    r"""`_WORDS` where marks and joiners continue a word: `\w` lacks the vowels of Hindi."""
    points = [*range(0x300, 0x1F000), *range(0xE0100, 0xE01F0)]
    marks = "".join(c for c in map(chr, points) if unicodedata.category(c)[0] == "M")
    marks = re.sub(f"[{_SINGLE}]", "", marks)
    letter = rf"[^\W{_SINGLE}]"
    return re.compile(rf"[{_SINGLE}]|{letter}(?:{letter}|[{marks}{_JOINERS}])*|[^\w\s]")


def _takes_prompt(scorer: Scorer) -> bool:
    return "prompt" in inspect.signature(scorer).parameters


def _is_punctuation(text: str) -> bool:
    return all(c in string.punctuation or unicodedata.category(c)[0] == "P" for c in text)


def _normalised(text: str) -> str:
    text = _DASHES.sub("-", text.casefold().strip())
    in_number = {match.start() for match in _IN_NUMBER.finditer(text)}
    kept = (c if i in in_number or not _separates(c) else " " for i, c in enumerate(text))
    return " ".join("".join(kept).split()) or text  # A "-" alone is an answer.


def _separates(character: str) -> bool:
    if character in "`_":
        return True
    return unicodedata.category(character)[0] == "P" and character not in "#%&*/@\\"


def _letters(text: str) -> str:
    return "".join(c for c in text.lower() if not c.isspace() and not _is_punctuation(c))


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _ngrams(tokens: Sequence[str], n: int) -> Ngrams:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _sari_n(source: Ngrams, predicted: Ngrams, expected: Ngrams) -> tuple[float, float, float]:
    """Scores for n-grams of one length kept, deleted and added."""
    kept, to_keep = source & predicted, source & expected
    correctly_kept = kept & expected
    deleted = source - predicted
    added, to_add = set(predicted) - set(source), set(expected) - set(source)
    correctly_added = len(added & to_add)
    return (
        _f1(_mean_share(correctly_kept, kept), _share(correctly_kept.total(), to_keep.total())),
        _mean_share(deleted - expected, deleted),
        _f1(_share(correctly_added, len(added)), _share(correctly_added, len(to_add))),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _mean_share(correct: Ngrams, total: Ngrams) -> float:
    return fmean(correct[gram] / count for gram, count in total.items()) if total else 1.0
