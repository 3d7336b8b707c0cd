"""Rows of several teachers in one batch, each compared in the classes of its own teacher's vocabulary."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill import losses
from llmdistill.data.collator import DistillCollator, completion_labels, first_items
from llmdistill.data.targets import KINDS
from llmdistill.losses import DIVERGENCES, Objective, fused
from llmdistill.losses.classes import ClassTable
from llmdistill.models.root_classes import RootClasses

V, D, K = 30, 8, 6
SIZES = {"same": 32, "near": 24, "far": 50}  # of the teachers' output layers; the first has the student's vocabulary, padded
KIND_LOSSES = [("sampled", "forward_kl"), ("multinomial", "forward_kl"), *(("topk", name) for name in DIVERGENCES)]


def classes_of(name, seed=0):
    if name == "same":
        return RootClasses.of_one_vocabulary(SIZES[name], V)
    rng = np.random.default_rng([seed, len(name)])
    sides = [np.concatenate([np.arange(9), rng.integers(0, 9, size - 9)]) for size in (SIZES[name], V)]
    return RootClasses(*(rng.permutation(side) for side in sides))


def rows_of(name, kind, count=3, seed=0, dense=None):
    """Rows as `retokenize` stores them; of the teacher with the student's vocabulary as it wrote them."""
    generator = torch.Generator().manual_seed(seed + len(name))
    rows = []
    for number in range(count):
        theirs, own, start = 4 + number, 5 + 2 * number, 2
        logits = torch.randn(theirs, SIZES[name], generator=generator) * 2
        if name == "same":
            own = theirs  # what pads its output layer has probability, too
        logprobs = logits.log_softmax(-1)
        soft = KINDS[kind]
        ids = soft.keep(logprobs, K, torch.rand(theirs, soft.uniforms(K), generator=generator))
        made = soft.from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
        columns = {key: value[0].values.to_numpy() for key, value in soft.encode([made], SIZES[name]).items()}
        tokens = torch.randint(0, V, (start + own,), generator=generator).numpy()
        places = np.arange(own) if name == "same" else np.where(np.arange(own) < theirs, np.arange(own), -1)
        if name != "same":
            places[1] = -1
        row = {"id": f"{name} {number}", "teacher": name, "input_ids": tokens, "completion_start": start, **columns}
        their_ids = torch.randint(0, SIZES[name], (start + theirs,), generator=generator).numpy()
        row |= {"teacher_ids": tokens if name == "same" else their_ids, "teacher_start": start, "target_places": places}
        rows.append(row)
        if dense is not None:
            dense[row["id"]] = logits
    return rows


def layer_and_hidden(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(D, V, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(V, D, generator=generator))
    return layer, torch.randn(count, D, generator=generator).requires_grad_()


def loss_of(form, hidden, layer, batch, objective):
    labels = completion_labels(batch)
    if form == "plain":
        return losses.distillation_loss(hidden @ layer.weight.T, labels, batch, objective)
    return fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective, chunk_bytes=5 * 4 * V)


def collated(rows, classes, **how):
    batch = DistillCollator(0, classes=classes, **how)(rows)
    return batch | ({"target_table": ClassTable.of(classes)} if classes is not None else {})


def interleaved(kind, **how):
    return [row for rows in zip(*(rows_of(name, kind, **how) for name in SIZES), strict=True) for row in rows]


def counts(rows):
    return [len(row["input_ids"]) - row["completion_start"] for row in rows]


def places_of(rows, name):
    """Where in the flat run of completion tokens those of a teacher's rows stand."""
    return torch.from_numpy(np.flatnonzero(np.repeat([row["teacher"] == name for row in rows], counts(rows))))


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize(("kind", "loss"), KIND_LOSSES)
@pytest.mark.parametrize("lacking", [(), ("near",), ("same", "far")])
def test_a_mixed_batch_is_the_sum_of_each_teachers_own(kind, loss, lacking, form, padding_free):
    """Each teacher's rows by themselves go the way of a single teacher; that with the student's vocabulary without classes."""
    rows = [row for row in interleaved(kind) if row["teacher"] not in lacking]
    classes = {name: classes_of(name) for name in SIZES}
    layer, hidden = layer_and_hidden(sum(counts(rows)))
    objective = Objective(loss, alpha=0.8)
    how = {"padding_free": padding_free, "position_weights": "certainty"}
    found, parts = loss_of(form, hidden, layer, collated(rows, classes, **how), objective)
    wanted, wanted_parts = 0, {}
    for name in SIZES.keys() - set(lacking):
        own = [row for row in rows if row["teacher"] == name]
        if name == "same":
            bare = [{key: value for key, value in row.items() if key != "target_places"} for row in own]
            batch = collated(bare, None, vocab_size=V, **how)
        else:
            batch = collated(own, classes[name], **how)
        value, its = loss_of(form, hidden[places_of(rows, name)], layer, batch, objective)
        wanted = wanted + value
        wanted_parts = {key: wanted_parts.get(key, 0) + value for key, value in its.items()}
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert {key: float(value) for key, value in parts.items()} == pytest.approx(
        {key: float(value) for key, value in wanted_parts.items()}, rel=1e-5, abs=1e-5
    )
    gradients = [torch.autograd.grad(value, (hidden, layer.weight)) for value in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_online_teachers_are_each_asked_for_their_own(loss, form):
    """Logits of three widths, in the order of their own rows."""
    dense = {}
    rows = interleaved("topk", dense=dense)
    classes = {name: classes_of(name) for name in SIZES}
    layer, hidden = layer_and_hidden(sum(counts(rows)))
    objective = Objective(loss, alpha=0.9)
    batch = collated(rows, classes, for_teacher=True)

    def logits_of(own):
        """What a teacher that runs beside the student says of the positions that it is asked for."""
        chosen = [dense[row["id"]][np.maximum(row["target_places"], 0)] for row in own]
        return torch.cat(chosen)

    each = {number: logits_of([row for row in rows if row["teacher"] == name]) for number, name in enumerate(SIZES)}
    batch["teacher_logits"] = losses.RoutedLogits(batch["target_teacher"], each)
    found, _ = loss_of(form, hidden, layer, batch, objective)
    wanted = 0
    for name in SIZES:
        own = [row for row in rows if row["teacher"] == name]
        one = collated(own, None if name == "same" else classes[name], for_teacher=True)
        one["teacher_logits"] = logits_of(own)
        value, _ = loss_of(form, hidden[places_of(rows, name)], layer, one, objective)
        wanted = wanted + value
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(v, (hidden, layer.weight)) for v in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_of_no_position_the_loss_of_several_online_teachers_is_zero_with_all_its_parts(loss, form):
    """One process may get nothing but filler in the last batch of an epoch; the others wait for its sums."""
    rows = interleaved("topk")
    classes = {name: classes_of(name) for name in SIZES}
    layer, hidden = layer_and_hidden(sum(counts(rows)))
    batch, objective = collated(rows, classes, for_teacher=True), Objective(loss, alpha=0.9)
    each = {n: torch.randn(int((batch["target_teacher"] == n).sum()), size) for n, size in enumerate(SIZES.values())}
    batch["teacher_logits"] = losses.RoutedLogits(batch["target_teacher"], each)
    _, wanted = loss_of(form, hidden, layer, batch, objective)
    nothing = first_items(batch, 0)
    value, parts = loss_of(form, hidden[:0], layer, nothing, objective)
    value.backward()
    assert (value.item(), {key: part.item() for key, part in parts.items()}) == (0, dict.fromkeys(wanted, 0))


def test_a_batch_of_text_alone_needs_no_teacher():
    """As the examples of a task are, which are trained on beside the rows of several teachers."""
    rows = [{"input_ids": np.arange(4), "completion_start": 2}]
    assert "target_teacher" not in DistillCollator(0, classes={name: classes_of(name) for name in SIZES})(rows)


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_teacher_beside_the_student_sees_its_own_rows_alone(padding_free):
    from llmdistill.data.collator import teacher_batch

    rows = interleaved("topk")
    batch = DistillCollator(0, classes={name: classes_of(name) for name in SIZES}, for_teacher=True, padding_free=padding_free)(
        rows
    )
    for number, name in enumerate(SIZES):
        theirs = teacher_batch(batch, number)
        shown = theirs["input_ids"].flatten()
        assert shown.max() < SIZES[name]
        own = [row for row in rows if row["teacher"] == name]
        want = [
            row["teacher_ids"][row["teacher_start"] + place - 1] for row in own for place in row["target_places"] if place >= 0
        ]
        soft = batch["target_soft"][batch["target_teacher"] == number]
        assert shown[theirs["positions"][soft]].tolist() == want
        assert len(theirs["positions"]) == sum(counts(own))


def test_a_row_of_an_unknown_teacher_is_refused():
    rows = interleaved("topk")
    with pytest.raises(ValueError, match="a row is of the teacher far, but the dataset has the teachers same, near"):
        DistillCollator(0, classes={name: classes_of(name) for name in ("same", "near")})(rows)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(9)), st.sampled_from(["sampled", "multinomial", "topk"]), st.integers(0, 3))
def test_ids_of_one_vocabulary_never_reach_the_table_of_another(order, kind, seed):
    """Every teacher's table notes what it is asked for: ids of its own rows alone, and no position without its class."""
    rows = interleaved(kind, seed=seed)
    rows = [rows[number] for number in order]
    asked = {name: set() for name in SIZES}

    class Noting(np.ndarray):
        def __getitem__(self, ids):
            asked[self.name].update(np.asarray(ids).ravel().tolist())
            return np.asarray(self)[ids]

    classes = {}
    for name in SIZES:
        made = classes_of(name, seed)
        table = made.teacher_V.view(Noting)
        table.name = name
        classes[name] = dataclasses.replace(made, teacher_V=table)
    batch = DistillCollator(0, classes=classes)(rows)
    for number, name in enumerate(SIZES):
        own = [row for row in rows if row["teacher"] == name]
        stored = KINDS[kind].of_rows(own, [len(row["teacher_ids"]) - row["teacher_start"] for row in own])
        assert set() < asked[name] <= set(stored.ids_NK.ravel().tolist()) | {0}
        assert batch["target_ids"][batch["target_teacher"] == number].max() < classes[name].count
    plain = {name: classes_of(name, seed) for name in SIZES}
    table = ClassTable.of(plain)
    numbered = table.numbered(batch["target_ids"], batch["target_teacher"])
    for number in range(3):
        there = numbered[(batch["target_teacher"] == number)[:, None] & (numbered >= 0)]
        assert (there >= table.first_G[number]).all()
        assert (there < table.first_G[number + 1]).all()


def test_classes_and_online_teachers_have_the_same_names():
    from llmdistill.training.arguments import DistillConfig
    from llmdistill.training.trainer import _check_given

    model, classes = torch.nn.Linear(1, 1), classes_of("near")
    args = DistillConfig("unused", use_cpu=True, bf16=False)
    _check_given(args, {"a": model, "b": model}, {"b": classes, "a": classes}, {})
    with pytest.raises(ValueError, match="classes are those of a, but the teachers are a, b"):
        _check_given(args, {"a": model, "b": model}, {"a": classes}, {})
    with pytest.raises(TypeError, match="teacher must be a loaded model, got str"):
        _check_given(args, {"a": "name"}, None, {})
