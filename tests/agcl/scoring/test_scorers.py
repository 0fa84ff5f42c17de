"""Scorers on published examples and on values computed by hand."""

import sys
import types

import pytest

from agcl.errors import InputError
from agcl.scoring.scorers import SCORERS, score, scorer_named


def value(name, prediction, reference, prompt=""):
    return score(SCORERS[name], prediction, reference, prompt)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("text", ["New York", "Ja, das ist gut.", "立场 支持", "x = f ( y )"])
def test_a_correct_answer_scores_one_and_an_empty_one_little(name, text):
    right = 0 if name == "rouge_l_stemmed" and not text.isascii() else 1  # As in `rouge_score`.
    assert value(name, text, text, prompt=f"{text} more") == pytest.approx(right)
    # An empty simplification deletes correctly and adds nothing wrong.
    assert value(name, "", text, prompt="else") <= (0.9 if name == "sari" else 0)


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "expected"),
    [
        ("exact_match", " Rome\n", "Rome", 1),
        ("exact_match", "rome", "Rome", 0),
        ("olora_match", "Science, or technology!", "Science or Technology", 1),
        ("olora_match", "very-positive", "very positive", 1),
        ("olora_match", "positive", "very positive", 0),
        ("olora_match", "3.14", "314", 1),
        ("first_character", " B because", "B\nThe line says so", 1),
        ("first_character", "A", "B", 0),
        ("first_character", "", "B", 0),
        # Precision 2/3, recall 2/4; "the" does not count.
        (
            "token_f1",
            "the red old house",
            "red house on hill",
            2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4),
        ),
        ("token_f1", "the", "a", 1),
        ("token_f1", "yes yes", "yes", 2 / 3),
        # Longest common subsequence "the cat on mat": 4 of 4, and 4 of 6 words.
        ("rouge_l", "the cat on mat", "The cat sat on the mat.", 0.8),
        (
            "rouge_l",
            "mat the on",
            "the cat sat on the mat",
            2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6),
        ),
        ("rouge_l", "支持学校", "学校", 2 * (2 / 4) / (2 / 4 + 1)),
        # Vowel signs and accents belong to their word: one word of four is equal.
        ("rouge_l", "कमल घर जाता है", "काला घोड़ा दौड़ता है", 0.25),
        ("rouge_l", "பெண் வந்தாள்", "பெண் போனாள்", 0.5),
        ("rouge_l", "שָׁלוֹם", "שִׁיר", 0),
        ("rouge_l", "می‌خواهم", "می‌روم", 0),
        ("rouge_l", "café", "cafe\u0301", 1),
        ("rouge_l", "ガラス", "カ\u3099ラス", 1),
        ("token_f1", "Rome ❤️", "Rome ❤️", 1),
        # By rouge_score 0.1.2 with use_stemmer=True. "runs" becomes "run", like "running".
        ("rouge_l_stemmed", "The dogs were running quickly", "a dog runs quickly, running", 0.6),
        (
            "rouge_l_stemmed",
            "He is flying to Lima's markets",
            "She flies to the market in Lima",
            3 / 7,
        ),
        ("rouge_l_stemmed", "relational studies of happiness", "relate the study of a happy", 0.8),
        ("rouge_l_stemmed", "naïve café", "naive cafe", 0),
        ("rouge_l_stemmed", "!!", "!!", 0),
        # fuzz.ratio, from rapidfuzz's documentation.
        ("edit_similarity", "this is a test", "this is a test!", 0.96551724137931),
        ("edit_similarity", "abc", "xyz", 0),
    ],
)
def test_values(name, prediction, reference, expected):
    assert value(name, prediction, reference) == pytest.approx(expected)


SAME = [
    "New  York",
    "new york.",
    " “NEW YORK”!",
    "New-York",
    "New\tYork?",
    "(New York)",
    "new, york",
]


@pytest.mark.parametrize("one", SAME)
@pytest.mark.parametrize("other", SAME)
def test_case_space_and_punctuation_do_not_count(one, other):
    assert value("normalised_exact_match", one, other) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("It is 3.14.", "it is 3.14"),
        ("-5!", "−5"),
        ("COVID-19", "Covid 19"),
        ("don't", "don’t"),
        ("on 2024-05-01,", "On 2024-05-01"),
        ("1,000.", "1,000"),
        ("C++", "c++."),
        ("हिन्दी।", "हिन्दी"),
    ],
)
def test_punctuation_around_numbers_and_signs_does_not_count(one, other):
    assert value("normalised_exact_match", one, other) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3.14", "314"),
        ("3,14", "314"),
        (".5", "5"),
        ("-.5", ".5"),
        ("-5", "5"),
        ("- 5", "5"),
        ("+5", "5"),
        ("x = -5", "x = 5"),
        ("(-5)", "(5)"),
        ("$-5", "$5"),
        ("1/2", "12"),
        ("1/2", "1 2"),
        ("3-5", "3 5"),
        ("2*3", "2/3"),
        ("x*y", "x/y"),
        ("12:30", "1230"),
        ("5%", "5"),
        ("$5", "5"),
        ("+", "-"),
        ("<", ">"),
        ("*", "/"),
        ("", "-"),
        ("", "."),
        ("C#", "C"),
        ("a b", "ab"),
        ("1 000", "1000"),
        ("कि", "की"),
    ],
)
def test_numbers_and_signs_are_not_equated(one, other):
    assert value("normalised_exact_match", one, other) == 0
    assert value("normalised_exact_match", other, one) == 0
    if one:  # Punctuation alone is an answer, but after words it is none.
        assert value("normalised_exact_match", f"It is {one}", f"It is {other}") == 0


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("About 95 species are currently known.", 0.21805555555555556),
        ("About 95 species are now accepted.", 0.28888888888888886),
        ("95 species are now accepted.", 0.3625),
    ],
)
def test_sari_of_hugging_faces_documented_example_with_one_reference(reference, expected):
    prompt, prediction = "About 95 species are currently accepted.", "About 95 you now get in."
    assert value("sari", prediction, reference, prompt) == pytest.approx(expected)


def test_sari_computed_by_hand():
    # 1-grams: source a b c, prediction a d, reference a d e.
    # keep: {a} of {a}, {a} of {a} -> 1; delete {b, c}, both correct -> 1; add {d} of {d}, {d, e}.
    add = [2 * 1 * 0.5 / 1.5]
    # 2-grams: source ab bc, prediction ad, reference ad de: nothing kept or to keep -> 1.
    add.append(2 * 1 * 0.5 / 1.5)
    # 3-grams: source abc, none predicted (precision 1), reference ade not found -> 0.
    # 4-grams: none -> 1 each.
    by_n = [(2 + add[0]) / 3, (2 + add[1]) / 3, (1 + 1 + 0) / 3, 1]
    assert value("sari", "a d", "a d e", prompt="a b c") == pytest.approx(sum(by_n) / 4)


def test_a_users_scorer_is_imported(monkeypatch):
    module = types.ModuleType("their_scorers")
    module.half = lambda prediction, reference: 0.5
    module.asks = lambda prediction, reference, prompt: float(prompt == "?")
    module.one = lambda prediction: 1.0
    module.number = 3
    monkeypatch.setitem(sys.modules, "their_scorers", module)
    assert score(scorer_named("their_scorers:half"), "a", "b", "?") == 0.5
    assert score(scorer_named("their_scorers:asks"), "a", "b", "?") == 1
    for name, message in [
        ("their_scorers:none", "no function 'none'"),
        ("their_scorers:one", "does not take"),
        ("their_scorers:number", "does not take"),
        ("their_scorers:", "no function ''"),
        ("no_such_module:f", "'no_such_module' cannot be imported"),
        ("rouge", r"no scorer 'rouge' \(choose from exact_match"),
    ]:
        with pytest.raises(InputError, match=f"evaluation.scorers: .*{message}"):
            scorer_named(name, "evaluation.scorers")
