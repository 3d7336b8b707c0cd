"""Teachers that are read one after the other: what is averaged in the end is the mean over their whole distributions."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmdistill import load_dataset
from llmdistill.config import Generate, Targets, Teacher, load_experiment
from llmdistill.config.teacher import ENGINES, Member
from llmdistill.curation.judge import DigitReader
from llmdistill.data.ids import row_seed
from llmdistill.data.targets import KINDS
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model
from llmdistill.stages.generate import generate
from llmdistill.teachers import EngineSpec, Request, ensemble
from llmdistill.teachers.ensemble import EnsembleEngine
from llmdistill.teachers.transformers import TransformersEngine
from tests.factories import VOCAB, sized, write_noisy

WEIGHTS = (5, 2, 3)
KEPT = {kind: sized(kind, 6) for kind in ("topk", "sampled", "multinomial")}


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """The tiny model and two that are like it but for some noise, the last with a vocabulary padded further."""
    directory = tmp_path_factory.mktemp("ensemble")
    return [tiny, write_noisy(tiny, directory / "1", 1), write_noisy(tiny, directory / "2", 2, padding=64)]


@pytest.fixture
def requests():
    generator = np.random.default_rng(0)
    return [Request(n, generator.integers(3, 2000, 5 + n).tolist(), row_seed(str(n), 0)) for n in range(6)]


def engine_of(models, kept, staging, **sampling):
    members = [Member(model=str(model), weight=weight) for model, weight in zip(models[1:], WEIGHTS[1:], strict=True)]
    teacher = Teacher(model=str(models[0]), engine="transformers", dtype="float32", weight=WEIGHTS[0], ensemble=members)
    return EnsembleEngine(EngineSpec(teacher, Generate(max_tokens=7, **sampling), kept, [2], 64, staging=staging))


def mean_of(models, request, ids):
    """0.5 p + 0.2 p' + 0.3 p'' in float64 over the vocabulary that all have."""
    text = torch.tensor([*request.prompt_ids, *ids])
    with torch.inference_mode():
        logits = [load_model(str(model)).double()(text[None]).logits[0, len(request.prompt_ids) - 1 : -1] for model in models]
    each = [logits_TV[:, :VOCAB].softmax(-1) for logits_TV in logits]
    return sum(weight / sum(WEIGHTS) * p for weight, p in zip(WEIGHTS, each, strict=True))


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_stored_is_of_the_mean(models, requests, kind, tmp_path):
    """For what the first writes, and for the same text where all of them read."""
    written = sorted(engine_of(models, KEPT[kind], tmp_path / "a").generate([requests[:4], requests[4:]]), key=lambda c: c.index)
    texts = [replace(request, completion_ids=made.ids.tolist()) for request, made in zip(requests, written, strict=True)]
    read = list(engine_of(models, KEPT[kind], tmp_path / "b").score([texts]))
    for completions in (written, read):
        for request, completion in zip(requests, completions, strict=True):
            mean = mean_of(models, request, completion.ids)
            own = mean.gather(1, torch.tensor(completion.ids)[:, None])[:, 0].log()
            np.testing.assert_allclose(completion.token_logprobs, own, atol=5e-4)
            targets = completion.targets
            p_NK = mean.gather(1, torch.tensor(targets.ids_NK)).numpy()
            if kind == "topk":
                np.testing.assert_allclose(np.exp(targets.logprobs_NK), p_NK, rtol=1e-3)
                np.testing.assert_allclose(targets.tail_N, 1 - p_NK.sum(1), atol=1e-4)
                np.testing.assert_allclose(p_NK[:, :3], mean.topk(3).values, rtol=1e-3)
            else:
                weights = np.exp(targets.logweights())
                np.testing.assert_allclose(weights.sum(1), 1, atol=1e-4)
                np.testing.assert_allclose(targets.entropy_N, -(weights * np.log(np.maximum(p_NK, 1e-9))).sum(1), rtol=2e-3)
    assert not list((tmp_path / "a").iterdir()), "what was staged goes once it is used"


def test_the_text_is_the_first_ones(models, requests, tmp_path):
    mixed = engine_of(models, KEPT["topk"], tmp_path).generate([requests])
    alone = engine_of(models, Targets(kind="none"), tmp_path).members[0]
    engine = TransformersEngine(EngineSpec(alone, Generate(max_tokens=7), KEPT["topk"], [2], 64))
    assert [made.ids.tolist() for made in mixed] == [made.ids.tolist() for made in engine.generate([requests])]


def test_weighted_sums_are_unbiased(models, requests, tmp_path):
    """Of random functions over many draws of the targets of one text, against the mean over the whole vocabulary."""
    text = replace(requests[0], completion_ids=[100, 200, 300])
    many = [replace(text, index=n, seed=row_seed(str(n), 1)) for n in range(300)]
    f_VF = np.random.default_rng(3).standard_normal((VOCAB, 8))
    want = mean_of(models, text, text.completion_ids).numpy() @ f_VF
    found = []
    for made in engine_of(models, KEPT["sampled"], tmp_path).score([many]):
        weights = np.exp(made.targets.logweights().astype(np.float64))
        found.append((weights[..., None] * f_VF[made.targets.ids_NK]).sum(1))
    found = np.stack(found)
    assert (np.abs(found.mean(0) - want) < 4 * found.std(0) / len(found) ** 0.5 + 1e-3).all()


def test_it_goes_on_where_it_was_killed(models, requests, tmp_path, monkeypatch):
    """Between two passes, and inside of one: finished files are not made again, and the result is that of an undisturbed run."""
    batches = [requests[:3], requests[3:]]
    whole = list(engine_of(models, KEPT["sampled"], tmp_path / "whole").generate(batches))
    opened = []
    own = ensemble.open_engine

    def counting(spec):
        opened.append(spec.teacher.model)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return own(spec)

    monkeypatch.setattr(ensemble, "open_engine", counting)
    with pytest.raises(KeyboardInterrupt):
        list(engine_of(models, KEPT["sampled"], tmp_path / "killed").generate(batches))
    assert len(list((tmp_path / "killed").glob("*.parquet"))) == 4
    next((tmp_path / "killed").glob("*-1.parquet")).unlink()
    again = list(engine_of(models, KEPT["sampled"], tmp_path / "killed").generate(batches))
    assert opened == [str(models[n]) for n in (0, 1, 2, 1, 2, 1, 0)], "the first does not write again"
    for mine, theirs in zip(again, whole, strict=True):
        assert mine.ids.tolist() == theirs.ids.tolist()
        np.testing.assert_array_equal(mine.targets.ids_NK, theirs.targets.ids_NK)
        np.testing.assert_array_equal(mine.targets.logweights(), theirs.targets.logweights())


def test_text_alone_needs_no_second_look(models, requests, tmp_path):
    engine = engine_of(models, Targets(kind="none"), tmp_path)
    assert len(engine.passes) == 3
    for request, made in zip(requests, engine.generate([requests]), strict=True):
        assert made.targets is None
        own = mean_of(models, request, made.ids).gather(1, torch.tensor(made.ids)[:, None])[:, 0].log()
        np.testing.assert_allclose(made.token_logprobs, own, atol=5e-4)


def test_a_dataset_of_it(models, experiment_file, monkeypatch):
    """As a stage makes it, with an engine that cannot average by itself."""
    monkeypatch.setitem(ENGINES, "transformers", replace(ENGINES["transformers"], whole_distribution=False))
    chosen = [("teacher.ensemble", f"[{{model: {models[1]}, weight: 2}}]"), ("targets", "{kind: sampled, n: 5}")]
    experiment = load_experiment(experiment_file, [*chosen, ("teacher.max_model_len", "64")])
    generate(experiment)
    directory = experiment.directory("data")
    rows = load_dataset(directory)
    assert len(rows) == 24
    assert not list(directory.glob(".ensemble*"))
    targets = KINDS["sampled"].of_rows([rows[0]], [len(rows[0]["token_logprobs"])])
    assert targets.ids_NK.shape == (len(rows[0]["token_logprobs"]), 5)
    described = json.loads((directory / "dataset.json").read_text())["teacher"]["ensemble"]
    assert described == [{"model": str(models[1]), "revision": None, "weight": 2.0}]


def test_what_it_cannot_do_is_refused_before_anything_is_loaded(models, experiment_file, tmp_path):
    member = ("teacher.ensemble", f"[{{model: {models[1]}}}]")
    for key, named in (("generate.thinking", "thinking: removed"), ("generate.json_schema", "json_schema")):
        value = "removed" if key.endswith("thinking") else "{type: object}"
        chosen = [member, ("teacher.engine", "vllm"), (key, value), ("curate", "[{finish_reason: }]")]
        with pytest.raises(InputError, match=rf"generate\.{named} .*does not support"):
            load_experiment(experiment_file, chosen)
    server = [member, ("teacher.engine", "server"), ("teacher.url", "http://localhost:1")]
    with pytest.raises(InputError, match="only engine vllm and transformers return"):
        load_experiment(experiment_file, server)
    teacher = Teacher(model=str(models[0]), engine="vllm", ensemble=[Member(model=str(models[1]))])
    with pytest.raises(InputError, match="a judge that is an ensemble needs engine transformers"):
        DigitReader(load_experiment(experiment_file), teacher, [1, 5])
    with pytest.raises(InputError, match=r"teacher\.model: .* has a context of 256 tokens, but 301 are needed"):
        EnsembleEngine(EngineSpec(teacher, Generate(), KEPT["topk"], [2], 300, staging=tmp_path))
