"""Word errors against counts made by hand."""

import random

import jiwer
import pytest

from agrepa_fast.evaluation.words import Errors, character_errors, load_normaliser, word_errors

PAIRS = [  # reference, heard, (words, substituted, deleted, inserted) after Whisper's normaliser
    ("a b c", "a b c", (3, 0, 0, 0)),
    ("a b c", "a x c", (3, 1, 0, 0)),
    ("a b c", "a c", (3, 0, 1, 0)),
    ("a b c", "a b b c", (3, 0, 0, 1)),
    ("a b c", "", (3, 0, 3, 0)),
    ("", "a b", (0, 0, 0, 2)),
    ("", "", (0, 0, 0, 0)),
    ("the the the", "the", (3, 0, 2, 0)),
    ("red green blue", "red blue green blue", (3, 0, 0, 1)),
    ("Fifty turns.", "50 turns", (2, 0, 0, 0)),
    ("don't go", "do not go", (3, 0, 0, 0)),
    ("it\u2019s late", "it's late", (3, 0, 0, 0)),
    ("[noise] hello", "hello", (1, 0, 0, 0)),
    ("Hello, World!", "hello world", (2, 0, 0, 0)),
    ("hello (sighs) world", "hello world", (2, 0, 0, 0)),
    ("twenty five", "25", (1, 0, 0, 0)),
    ("a b c d", "w x y z", (4, 4, 0, 0)),
    ("press one", "press", (2, 0, 1, 0)),
    ("go", "go go go go", (1, 0, 0, 3)),
    ("um hello", "hello", (1, 0, 0, 0)),
]


@pytest.mark.parametrize(("reference", "heard", "counts"), PAIRS)
def test_counts_made_by_hand(reference, heard, counts):
    normalise = load_normaliser("whisper", "en", {})
    errors = word_errors(normalise(reference), normalise(heard))
    assert errors.units == counts[0]
    assert errors.total == sum(counts[1:])
    assert errors == Errors(*counts)


def test_the_rate_of_all_words_is_not_the_mean_of_the_clips_rates():
    short, long = word_errors("a", "b"), word_errors(" ".join("abcdefghi"), " ".join("abcdefghi"))
    pooled = (short.total + long.total) / (short.units + long.units)
    assert pooled == 0.1
    assert (short.total / short.units + long.total / long.units) / 2 == 0.5


def test_equals_jiwer_on_random_texts():
    draw = random.Random(0)
    for _ in range(500):
        reference, heard = (" ".join(draw.choices("abcd", k=draw.randint(1, 9))) for _ in range(2))
        assert word_errors(reference, heard).total / len(reference.split()) == pytest.approx(
            jiwer.wer(reference, heard)
        )
        errors = character_errors(reference, heard)
        assert errors.total / len(reference) == pytest.approx(jiwer.cer(reference, heard))


def test_errors_are_capped_by_the_words():
    assert word_errors("go", "go on and on").capped == 1
    assert word_errors("go on", "").capped == 2
    assert word_errors("", "a").capped == 0


@pytest.mark.parametrize(
    ("text", "name", "english", "chinese"),
    [
        ("Don\u2019t, stop - \u201cit's\u201d 50%!", "seedtts", "dont stop it's 50", "D o n t s t o p i t ' s 5 0"),
        ("Don\u2019t, stop - \u201cit's\u201d 50%!", "f5", "dont stop its 50", "D o n t s t o p i t s 5 0"),
        ("你好\uff0c世界。", "seedtts", "你好世界", "你 好 世 界"),
        ("一\u3000二\uff5e三", "f5", "一二三", "一 二 三"),  # zhon's list has the wide space and some symbols
        (
            "\u00bfqu\u00e9? \u00abno\u00bb",
            "seedtts",
            "\u00bfqu\u00e9 \u00abno\u00bb",
            "\u00bf q u \u00e9 \u00ab n o \u00bb",
        ),  # not these
    ],
)
def test_texts_of_published_definitions(text, name, english, chinese):
    assert load_normaliser(name, "en", {})(text) == english
    assert load_normaliser(name, "zh", {})(text) == chinese


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("whisper", (8, 2, 2, 0)),  # it is bob is is not it 50, and its bobs is not it 50
        ("seedtts", (5, 3, 0, 0)),  # it's, bob's and fifty differ
        ("f5", (5, 1, 0, 0)),  # fifty differs
    ],
)
def test_one_sentence_in_each_definition(name, counts):
    normalise = load_normaliser(name, "en", {})
    assert word_errors(normalise("It's Bob's, isn't it? Fifty!"), normalise("Its Bobs isn't it 50")) == counts


def test_spellings_and_other_languages():
    assert load_normaliser("whisper", "en", {})("the colour") == "the colour"
    assert load_normaliser("whisper", "en", {"colour": "color"})("the colour") == "the color"
    assert load_normaliser("whisper", "de", {})("Sch\u00f6ne Gr\u00fc\u00dfe!") == "sch\u00f6ne gr\u00fc\u00dfe"
