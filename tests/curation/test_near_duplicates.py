"""Near-duplicates against brute force: whatever the index finds, the similarities are the true ones."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.curation.near_duplicates import best_bands
from llmdistill.data.ngrams import words
from tests.curation.steps import apply_step, table

WORDS = [f"w{n}" for n in range(400)]


def random_text(chance, length=60):
    return " ".join(chance.choice(WORDS) for _ in range(length))


def changed(text, share, chance):
    return " ".join(chance.choice(WORDS) if chance.random() < share else word for word in text.split())


def true_jaccard(a, b, n=3):
    sets = [set(zip(*(words(text)[offset:] for offset in range(n)), strict=False)) for text in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def by_brute_force(texts, threshold):
    """For each text the kept one before it that is most like it, if any is like enough."""
    kept, found = [], []
    for number, text in enumerate(texts):
        best = max(((true_jaccard(text, texts[first]), -first) for first in kept), default=(0.0, 0))
        found.append((best[0], -best[1]) if best[0] >= threshold else None)
        if found[-1] is None:
            kept.append(number)
    return found


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_near_duplicates_are_those_of_brute_force(tmp_path, threshold):
    """Nothing is rejected that is not; of what should be, the index may miss one in twenty at the threshold itself."""
    chance = random.Random(threshold)
    originals = [random_text(chance) for _ in range(40)]
    texts = originals + [changed(chance.choice(originals), chance.random() ** 3 * 0.25, chance) for _ in range(160)]
    chance.shuffle(texts)
    reasons, facts = apply_step(tmp_path, {"near_duplicates": {"threshold": threshold, "boilerplate": 1}}, table(texts), group=37)
    want = by_brute_force(texts, threshold)
    for number, reason in enumerate(reasons):
        if reason is not None:
            similarity, first = reason.removeprefix("similarity ").split(" to row")
            assert reasons[int(first)] is None
            true = true_jaccard(texts[number], texts[int(first)])
            assert true >= threshold
            assert similarity == f"{true:.2f}"
    found, wanted = sum(reason is not None for reason in reasons), sum(entry is not None for entry in want)
    assert 0.9 * wanted <= found <= wanted + 2  # what was missed is kept, and may then reject others
    assert wanted > 20
    assert facts["clusters"] == len({reason.split()[-1] for reason in reasons if reason})


def test_likeness_is_not_handed_on(tmp_path):
    """A chain in which each text is like the one before: the ends have nothing in common, and both stay."""
    text = WORDS[:60]
    chain = [text[step : step + 40] for step in range(0, 21, 2)]
    reasons, _ = apply_step(
        tmp_path, {"near_duplicates": {"threshold": 0.7, "boilerplate": 1}}, table([" ".join(part) for part in chain])
    )
    kept = [number for number, reason in enumerate(reasons) if reason is None]
    assert kept[0] == 0
    assert len(kept) >= 3
    for a, b in itertools.pairwise(kept):
        assert true_jaccard(" ".join(chain[a]), " ".join(chain[b])) < 0.7


def test_a_template_does_not_make_near_duplicates(tmp_path):
    """Three hundred answers of one form: by their text 80% alike, by what is their own not at all."""
    chance = random.Random(0)
    form = random_text(chance, 80)
    texts = [f"{form} {random_text(chance, 8)} {form}" for _ in range(300)]
    assert true_jaccard(texts[0], texts[1]) > 0.75
    rows = table(texts)
    reasons, facts = apply_step(tmp_path, {"near_duplicates": {"threshold": 0.7}}, rows)
    assert reasons == [None] * 300
    assert 70 <= facts["boilerplate_ngrams"] <= 90
    # Not looked for, the template takes all it may: that is what the cap is for.
    without = {"threshold": 0.7, "boilerplate": 1, "max_cluster": 50}
    reasons, facts = apply_step(tmp_path, {"near_duplicates": without}, rows)
    assert sum(reason is not None for reason in reasons) == 50
    assert facts["kept_beyond_max_cluster"] == 249
    assert facts["largest"] == [{"kept": "row0", "rejected": 50, "kept_beyond": 249}]


def test_duplicates_within_a_template_are_found(tmp_path):
    chance = random.Random(1)
    form, own = random_text(chance, 40), [random_text(chance, 12) for _ in range(60)]
    texts = [f"{form} {text} {form}" for text in own] + [f"{form} {own[7]} {form}", form, form]
    reasons, _ = apply_step(tmp_path, {"near_duplicates": {"threshold": 0.8}}, table(texts))
    assert reasons[:60] == [None] * 60
    assert reasons[60:] == ["similarity 1.00 to row7", None, "similarity 1.00 to row61"]


def test_short_and_empty_texts(tmp_path):
    rows = table(["", "yes", "!", "no", "Yes.", "yes no"])
    reasons, _ = apply_step(tmp_path, {"near_duplicates": None}, rows)
    assert reasons == [None, None, None, None, "similarity 1.00 to row1", None]


@given(st.floats(0.3, 1))
def test_few_pairs_at_the_threshold_are_missed(threshold):
    bands, rows = best_bands(threshold)
    assert bands * rows <= 128
    assert bands >= 2
    assert (1 - threshold**rows) ** bands <= 0.05
