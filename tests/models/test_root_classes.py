"""Root classes of real vocabularies."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from llmdistill.errors import InputError
from llmdistill.models.root_classes import RootClasses, Vocabulary, load_classes, root_classes, save_classes
from llmdistill.models.token_bytes import token_bytes
from tests.factories import sentencepiece_tokenizer, small_tokenizer


@pytest.fixture(scope="module")
def vocabularies(smollm2):
    found = {"smollm2": AutoTokenizer.from_pretrained(smollm2), "sentencepiece": sentencepiece_tokenizer()}
    found["small"] = small_tokenizer("the cat sat on the mat, and then the other cat said that ", 300)
    return {name: Vocabulary.of(one, [one.eos_token_id], len(one) + 7, name) for name, one in found.items()}


PAIRS = [("smollm2", "small"), ("small", "smollm2"), ("smollm2", "sentencepiece")]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_class_is_named_by_a_token_of_both_and_its_tokens_begin_with_it(vocabularies, teacher, student):
    sides = vocabularies[teacher], vocabularies[student]
    classes = root_classes(*sides)
    named: dict[int, bytes] = {}
    strings = [frozenset(string for string in side.bytes_of if string) for side in sides]
    for string in strings[0] & strings[1]:
        for side, of in zip(sides, (classes.teacher_V, classes.student_V), strict=True):
            for token, other in enumerate(side.bytes_of):
                if other == string and token not in side.end_ids:
                    assert named.setdefault(int(of[token]), string) == string
        if len(named) > 400:
            break
    for side, of in zip(sides, (classes.teacher_V, classes.student_V), strict=True):
        for token, string in enumerate(side.bytes_of):
            if string and int(of[token]) in named:
                assert string.startswith(named[int(of[token])])


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_the_partition_covers_both_output_layers(vocabularies, teacher, student):
    sides = vocabularies[teacher], vocabularies[student]
    classes = root_classes(*sides)
    end, rest = classes.count - 2, classes.count - 1
    for side, of in zip(sides, (classes.teacher_V, classes.student_V), strict=True):
        assert len(of) == side.size
        assert set(np.flatnonzero(of == end)) == set(side.end_ids)
        assert (of[-7:] == rest).all()  # ids that pad the output layer
        sizes = np.bincount(of, minlength=classes.count)
        assert (sizes[:end] > 0).all()  # every root is a token of both


def test_one_vocabulary_gives_a_class_a_token(vocabularies):
    side = vocabularies["small"]
    classes = root_classes(side, side)
    assert (classes.teacher_V == classes.student_V).all()
    sizes = np.bincount(classes.student_V)
    specials = sum(string is None for string in side.bytes_of)
    assert (sizes[:-1] == 1).all()
    assert sizes[-1] == specials - 1 + 7


def test_the_root_follows_both_encodings_in_turn():
    """abc is the student's alone; the teacher begins it with ab, which the student begins with a."""
    theirs, own = [b"a", b"b", b"c", b"ab"], [b"a", b"b", b"c", b"abc"]

    def longest(vocabulary):
        return lambda strings: [max((t for t in vocabulary if s.startswith(t)), key=len) for s in strings]

    classes = root_classes(Vocabulary(theirs, [], 4, longest(theirs)), Vocabulary(own, [], 4, longest(own)))
    assert classes.teacher_V.tolist() == [0, 1, 2, 0]
    assert classes.student_V.tolist() == [0, 1, 2, 0]


def test_classes_are_stored_and_read(vocabularies, tmp_path):
    classes = root_classes(vocabularies["smollm2"], vocabularies["small"])
    classes.save(tmp_path)
    found = RootClasses.load(tmp_path)
    assert found.hash == classes.hash
    assert (found.teacher_V == classes.teacher_V).all()


def test_a_damaged_file_of_classes_is_named(tmp_path):
    RootClasses.of_one_vocabulary(500, 400).save(tmp_path)
    file = tmp_path / "classes.npz"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"teacher.npy") + 60] ^= 255
    for damaged in (b"none", b"", whole[: len(whole) // 2], whole[:4], bytes(flipped)):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"classes\.npz: cannot be read: \S"):
            load_classes(tmp_path)


def test_classes_that_the_targets_were_not_aligned_by_are_refused(tmp_path):
    classes, other = RootClasses.of_one_vocabulary(7, 5), RootClasses.of_one_vocabulary(7, 6)
    hashes = {"classes_hash": classes.hash}
    for by_teacher, changed, alignment in (
        ({"": classes}, {"": other}, hashes),
        ({"a": classes}, {"a": other}, {"teachers": {"a": hashes}, "classes_hash": "of both"}),
        ({"": classes}, {"a": classes}, hashes),
    ):
        (tmp_path / "dataset.json").write_text(json.dumps({"alignment": alignment}))
        save_classes(by_teacher, tmp_path)
        assert load_classes(tmp_path).keys() == by_teacher.keys()
        save_classes(changed, tmp_path)
        with pytest.raises(InputError, match=r"classes\.npz: the classes do not match their hash in dataset\.json"):
            load_classes(tmp_path)


def test_classes_of_several_teachers_are_read_by_their_names(vocabularies, tmp_path):
    both = {
        "a/b.teacher": root_classes(vocabularies["smollm2"], vocabularies["small"]),
        "same": RootClasses.of_one_vocabulary(7, vocabularies["small"].size),
    }
    save_classes(both, tmp_path)
    found = load_classes(tmp_path)
    assert {name: classes.hash for name, classes in found.items()} == {name: classes.hash for name, classes in both.items()}
    assert [classes.are_tokens for classes in found.values()] == [False, True]
    with pytest.raises(
        InputError, match=r"classes\.npz: contains classes of several teachers, a/b\.teacher, same; use load_classes"
    ):
        RootClasses.load(tmp_path)


def test_tokens_that_pad_the_teachers_output_layer_are_dropped():
    classes = RootClasses.of_one_vocabulary(5, 3)
    assert classes.teacher_V.tolist() == [0, 1, 2, 3, 3]
    assert classes.dropped == 3
    assert RootClasses.of_one_vocabulary(3, 5).dropped is None


def test_the_bytes_of_ids_are_the_text(vocabularies, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert vocabularies["smollm2"].bytes_of == token_bytes(tokenizer)
