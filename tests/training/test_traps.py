"""Each trap is said where a run is in it, with the key that gets it out, and is not said where it is not."""

import re

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from llmdistill.config.student import Student
from llmdistill.data.collator import DistillCollator
from llmdistill.models.loading import load_config, load_tokenizer, vocabulary_hash
from llmdistill.training.traps import end_token, learning_rate, rows_without_end, soft_targets, traps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """A model as `tiny`, without weights, that ends its text with another token: the base of a family."""
    directory = tmp_path_factory.mktemp("base")
    config = AutoConfig.from_pretrained(tiny)
    config.eos_token_id = 0
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(directory)
    return str(directory)


def manifest_of(model, ends):
    return {"tokenizer": {"end_token_ids": ends, "vocabulary_hash": vocabulary_hash(load_tokenizer(model, None))}}


def stored(reasons=("stop",) * 4, tails=None, lengths=(6,) * 4, k=2):
    columns = {"finish_reason": list(reasons), "input_ids": [list(range(length)) for length in lengths]}
    if tails is not None:
        columns["target_tail"] = tails
        columns["target_ids"] = [[1] * (k * len(row)) for row in tails]
        columns["target_logprobs"] = [[-1.0] * (k * len(row)) for row in tails]
    return Dataset(pa.table(columns))


def test_a_base_student_after_an_instructed_teacher(base, tiny):
    text = end_token(Student(model=base), manifest_of(base, [2]))
    assert re.search(r"student.model ends its text with <\|endoftext\|>; the rows also end with <\|im_end\|>", text)
    assert end_token(Student(model=base), manifest_of(base, [0])) is None
    assert end_token(Student(model=str(tiny)), manifest_of(base, [2])) is None
    assert end_token(Student(prune={"layers": 2}), manifest_of(base, [2])) is None


def test_adapters_leave_the_new_end_token_frozen_unless_told(base, tmp_path):
    text = end_token(Student(model=base, lora={}), manifest_of(base, [2]))
    assert text.endswith("set student.lora.args.trainable_token_indices to [2]")
    told = Student(model=base, lora={"args": {"trainable_token_indices": [2]}})
    assert end_token(told, manifest_of(base, [2])) is None
    untied = load_config(base, None)
    untied.tie_word_embeddings = False
    untied.save_pretrained(tmp_path)
    load_tokenizer(base, None).save_pretrained(tmp_path)
    text = end_token(Student(model=str(tmp_path), lora={}), manifest_of(base, [2]))
    assert text.endswith("trainable_token_indices to {'embed_tokens': [2], 'lm_head': [2]}")


def test_a_student_with_a_vocabulary_of_its_own_learns_its_own_end_token(base):
    other = {"tokenizer": {"end_token_ids": [2], "vocabulary_hash": "another"}}
    assert end_token(Student(model=base), other) is None


def test_too_few_targets_for_the_teachers_entropy():
    text = soft_targets(stored(tails=[[0.0, 0.1], [0.1], [0.1, 0.1, 0.2], [0.0]]))
    assert text.startswith("targets.k is 2, which leaves 9% of the teacher's probability mass outside")  # 0.6 / 7
    assert "raise targets.k, or set targets.kind to sampled" in text
    assert soft_targets(stored(tails=[[0.0, 0.05], [0.05], [0.05], [0.05]])) is None
    assert soft_targets(stored()) is None


@pytest.mark.parametrize(
    ("student", "rate", "parameters", "said"),
    [
        ({"model": "m", "lora": {}}, 2e-5, 7e9, "adapters (student.lora) usually need about ten times that, 0.0002"),
        ({"model": "m", "lora": {}}, 2e-4, 7e9, None),
        ({"prune": {"layers": 2}, "lora": {}}, 1e-4, 1e8, "about ten times that, 0.001"),
        ({"model": "m"}, 2e-4, 7e9, "all weights of a 7.0B model usually need about 2e-05"),
        ({"model": "m"}, 2e-5, 7e9, None),
        ({"prune": {"layers": 2}}, 1e-3, 8e7, None),  # a small model takes large steps well
        ({"config": {}}, 5e-4, 2e9, None),
    ],
)
def test_a_learning_rate_of_the_other_way_of_training(student, rate, parameters, said):
    text = learning_rate(Student(**student), rate, int(parameters))
    assert text is None if said is None else (text.startswith(f"train.args.learning_rate is {rate:g}, ") and said in text)


def test_rows_that_never_end():
    text = rows_without_end(stored(["length"] * 9 + ["stop"], lengths=[6] * 10), None)
    assert text.startswith("90% of the rows are cut off before they end")
    assert "raise generate.max_tokens, or keep only rows that end: curate: [{finish_reason: {keep: [stop]}}]" in text
    assert "raise train.args.max_length" in rows_without_end(stored(lengths=[9] * 4), 8)
    assert rows_without_end(stored(["length"] * 3 + ["stop"]), None) is None
    assert rows_without_end(stored(lengths=[8] * 4), 8) is None


def test_a_run_in_no_trap_says_nothing(tiny):
    class Arguments:
        uses_targets, learning_rate, max_length = True, 2e-5, None

    rows = stored(tails=[[0.01]] * 4)
    assert list(traps(Student(model=str(tiny)), Arguments(), manifest_of(str(tiny), [2]), rows, 10**8)) == []
    rows = stored(["length"] * 4, tails=[[0.2]] * 4)
    assert len(list(traps(Student(model=str(tiny)), Arguments(), manifest_of(str(tiny), [2]), rows, 10**8))) == 2


def test_a_padding_token_that_is_the_end_token_is_harmless():
    """Labels come from lengths, not from ids: the end token of every row is learned, whatever pads the others."""
    end = 2
    rows = [{"input_ids": np.array([5, 6, *range(7, 7 + n), end]), "completion_start": 2} for n in (1, 4, 2)]
    batch = DistillCollator(pad_token_id=end)(rows)
    assert (batch["input_ids"] == end).sum() > 3  # there is padding
    assert (batch["labels"] == end).sum(dim=1).tolist() == [1, 1, 1]
    assert [(row != -100).sum() for row in batch["labels"]] == [2, 5, 3]
