import pytest

from hf_zo.tasks.text import exact_match, normalized, token_f1


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The  Eiffel Tower.", "eiffel tower"),
        ("an apple, a pear", "apple pear"),
        ("theatre", "theatre"),  # an article inside a word stays
        ("U.S.A.", "usa"),
        ("The", ""),
    ],
)
def test_normalized(answer, plain):
    assert normalized(answer) == plain


def test_exact_match_ignores_case_articles_and_punctuation():
    assert exact_match("The Tower!", "tower") == 1.0
    assert exact_match("tower", "towers") == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("big red dog", "red dog", 2 * 2 / 5),
        ("dog dog", "dog", 2 * 1 / 3),  # a word counts as often as both have it
        ("cat", "dog", 0.0),
        ("The dog", "dog", 1.0),
        ("the", "a", 1.0),  # nothing is left of either
        ("", "dog", 0.0),
        ("dog", "", 0.0),
    ],
)
def test_token_f1(answer, reference, f1):
    assert token_f1(answer, reference) == pytest.approx(f1, abs=1e-12)
