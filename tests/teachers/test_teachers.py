"""The exact engine, and how vLLM's log-probabilities are read."""

import inspect
import pkgutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmdistill.config import Generate, Targets, Teacher
from llmdistill.config.teacher import ENGINES, Abilities, Member, engines_with
from llmdistill.data.ids import row_id, row_seed
from llmdistill.data.targets import TopK
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model
from llmdistill.teachers import (
    Engine,
    EngineSpec,
    Request,
    check_engine,
    fingerprints,
    open_engine,
    teacher_precision,
)
from llmdistill.teachers.transformers import TransformersEngine, sample
from llmdistill.teachers.vllm import flat_logprobs
from tests.factories import VOCAB, sized, write_noisy

MESSAGES = [{"role": "user", "content": "hello"}]


def test_an_ensemble_of_two_revisions_of_a_model_is_none_of_others():
    def found(first):
        ensemble = [{"model": "org/m", "revision": "step9000"}]
        return fingerprints(Teacher(model="org/m", revision=first, engine="transformers", ensemble=ensemble))

    inputs, whole = found("step1000")
    assert inputs == {"org/m": "org/m@step1000", "org/m@step9000": "org/m@step9000"}
    assert whole != found("step2000")[1]


def test_the_sampled_token_beside_the_top_k_is_never_counted_as_one_of_them():
    """At the first position it is the second of the top 2, at the second it has rank 9; it always stands first."""

    class Flat:
        start_indices = [0, 3]
        token_ids = [7, 5, 7, 9, 1, 2]
        logprobs = np.log([0.3, 0.6, 0.3, 0.01, 0.5, 0.4]).tolist()

    chosen, *found = flat_logprobs(Flat, 2)
    kept = TopK.from_kept(*found)
    assert kept.ids_NK.tolist() == [[5, 7], [1, 2]]
    np.testing.assert_allclose(np.exp(chosen), [0.3, 0.01], rtol=1e-6)
    np.testing.assert_allclose(kept.tail_N, [0.1, 0.1], rtol=1e-5)


def test_sampling_follows_the_distribution_and_its_cuts():
    logprobs = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log().expand(20000, -1)
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = lambda **kw: torch.bincount(sample(logprobs, Generate(**kw), uniform), minlength=4) / 20000  # noqa: E731
    torch.testing.assert_close(shares(), torch.tensor([0.5, 0.1, 0.3, 0.1]), atol=0.012, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0.625, 0.0, 0.375, 0.0]), atol=0.012, rtol=0)
    torch.testing.assert_close(shares(top_p=0.7), torch.tensor([0.625, 0.0, 0.375, 0.0]), atol=0.012, rtol=0)
    squares = torch.tensor([0.25, 0.01, 0.09, 0.01])
    torch.testing.assert_close(shares(temperature=0.5), squares / squares.sum(), atol=0.012, rtol=0)
    assert shares(temperature=0).tolist() == [1, 0, 0, 0]


class Echo:
    """An engine of this module, for the table."""

    def __init__(self, spec):
        self.spec = spec


def test_a_new_engine_is_an_entry_of_the_table(tiny, monkeypatch):
    monkeypatch.setitem(ENGINES, "echo", Abilities(f"{__name__}:Echo", "it depends", grammar=True))
    teacher = Teacher(model=str(tiny)).model_copy(update={"engine": "echo"})
    assert engines_with("grammar") == "vllm, server, openai and echo"
    spec = EngineSpec(teacher, Generate(), Targets(), [2], 64, seed=7, reads_with=100)
    precision = teacher_precision(teacher)
    assert open_engine(spec).spec == replace(spec, teacher=teacher.model_copy(update={"dtype": precision.dtype}))


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_is_made_from_the_same(name):
    """Mypy looks at the methods of a protocol, and not at how its classes are made."""
    if (package := ENGINES[name].package) not in (None, "vllm"):
        pytest.importorskip(package, reason=f"the extra `{ENGINES[name].extra}` is not installed")
    engine = pkgutil.resolve_name(ENGINES[name].implementation)
    needed = [name for name, one in inspect.signature(engine.__init__).parameters.items() if one.default is one.empty]
    assert needed == list(inspect.signature(Engine.__init__).parameters)


def exact_engine(teacher, sampling, kept, end_ids=(2,)):
    return TransformersEngine(EngineSpec(teacher, sampling, kept, end_ids, max_model_len=64))


@pytest.fixture(scope="module")
def requests():
    generator = np.random.default_rng(0)
    return [Request(n, generator.integers(3, 2000, 2 + 3 * n).tolist(), seed=n) for n in range(5)]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_the_exact_engine_stores_the_models_own_distribution(tiny, requests, temperature):
    """Against one plain forward pass over each finished sequence: the same at any sampling temperature."""
    teacher = Teacher(model=str(tiny), engine="transformers", dtype="float32", batch_size=3)
    engine = exact_engine(teacher, Generate(max_tokens=7, temperature=temperature), Targets(kind="topk", k=5))
    model = load_model(str(tiny))
    completions = list(engine.generate([requests[:2], requests[2:]]))
    assert [completion.index for completion in completions] == [0, 1, 2, 3, 4]
    for completion, request in zip(completions, requests, strict=True):
        ids = torch.tensor([*request.prompt_ids, *completion.ids])
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, len(request.prompt_ids) - 1 : -1]
        logprobs = logits.double().log_softmax(-1)
        top = logprobs.topk(5)
        np.testing.assert_allclose(completion.targets.logprobs_NK, top.values, atol=2e-4)
        np.testing.assert_allclose(completion.targets.tail_N, 1 - top.values.exp().sum(-1), atol=2e-4)
        np.testing.assert_allclose(
            completion.token_logprobs, logprobs.gather(1, torch.tensor(completion.ids)[:, None])[:, 0], atol=2e-4
        )
        assert completion.finish_reason == ("stop" if completion.ids[-1] == 2 else "length")
        if temperature:
            sampled = (logits.double() / temperature).log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None]).sum()
            assert completion.sampling_logprob == pytest.approx(sampled.item(), abs=2e-3)
        else:
            assert completion.sampling_logprob is None, "greedy text is no sample"


def test_no_completion_ends_before_its_least_length(tiny, requests):
    """Where every token that the teacher would write first is an end: what it would have liked is stored all the same."""
    teacher = Teacher(model=str(tiny), engine="transformers", dtype="float32")

    def written(ends, least):
        sampling = Generate(max_tokens=8, temperature=0, min_tokens=least)
        return list(exact_engine(teacher, sampling, Targets(kind="topk", k=5), ends).generate([requests]))

    ends = sorted({int(completion.ids[0]) for completion in written([2], 0)})
    short, long = written(ends, 0), written(ends, 5)
    assert {len(completion.ids) for completion in short} == {1}
    for before, completion in zip(short, long, strict=True):
        assert len(completion.ids) >= 5
        assert not np.isin(completion.ids[:5], ends).any()
        assert completion.targets.ids_NK[0].tolist() == before.targets.ids_NK[0].tolist()
        assert completion.targets.ids_NK[0, 0] in ends


def test_a_rows_text_depends_on_its_seed_alone(tiny, requests):
    def texts(batch_size, order):
        teacher = Teacher(model=str(tiny), engine="transformers", dtype="float32", batch_size=batch_size)
        engine = exact_engine(teacher, Generate(max_tokens=6), Targets(kind="none"))
        return {c.index: c.ids.tolist() for c in engine.generate([[requests[n] for n in order]])}

    assert texts(1, [0, 1, 2, 3, 4]) == texts(5, [4, 2, 0, 1, 3])


def test_the_exact_engines_sample_is_unbiased(tiny):
    """One position, many seeds: for any f, the mean of Σ weight · f is Σ p · f; and each sample's weights add up to one."""
    teacher = Teacher(model=str(tiny), engine="transformers", dtype="float32", batch_size=500)
    engine = exact_engine(teacher, Generate(max_tokens=1, temperature=0), Targets(kind="sampled", n=6))
    prompt = [5, 77, 301]
    completions = engine.generate([[Request(seed, prompt, seed) for seed in range(2000)]])
    with torch.inference_mode():
        p_V = load_model(str(tiny))(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    f_VF = np.random.default_rng(0).normal(size=(len(p_V), 20))
    sums = []
    for completion in completions:
        weights = np.exp(completion.targets.logweights_NK[0].astype(np.float64))
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        sums.append(weights @ f_VF[completion.targets.ids_NK[0]])
    standard_error = np.std(sums, axis=0) / len(sums) ** 0.5
    assert len(sums) == 2000
    assert (np.abs(np.mean(sums, axis=0) - p_V @ f_VF) < 4.5 * standard_error + 1e-4).all()


def test_row_ids():
    sampling = Generate(temperature=0.7)
    first = row_id(MESSAGES, "teacher", sampling, 0)
    assert first == row_id(MESSAGES, "teacher", Generate(temperature=0.7, samples=9, rows_per_shard=5), 0)
    others = {
        row_id(MESSAGES, "teacher", sampling, 1),
        row_id(MESSAGES, "x", sampling, 0),
        row_id(MESSAGES, "teacher", Generate(), 0),
    }
    assert len({first, *others}) == 4
    assert row_seed(first, 0) != row_seed(first, 1)
    assert 0 <= row_seed(first, 0) < 2**63


def test_an_engine_that_is_not_installed_is_said_before_anything_is_written(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_engine(Teacher(model="m", engine="transformers"))
    with pytest.raises(
        InputError, match=r"teacher\.engine vllm needs vllm, which is not installed: pip install 'llmdistill\[generate\]', or set"
    ):
        check_engine(Teacher(model="m", engine="vllm"))


@pytest.fixture(scope="module")
def three_teachers(tiny, tmp_path_factory):
    """The tiny model and two that are like it but for some noise, the last with a vocabulary padded further."""
    directory = tmp_path_factory.mktemp("ensemble")
    return [tiny, write_noisy(tiny, directory / "1", 1), write_noisy(tiny, directory / "2", 2, padding=64)]


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_the_mean_of_several_teachers_against_a_dense_one(three_teachers, requests, kind):
    """0.5 p + 0.2 p' + 0.3 p'' in float64 over whole vocabularies, for what they write and what they read."""
    first, *others = map(str, three_teachers)
    members = [Member(model=model, weight=weight) for model, weight in zip(others, (2, 3), strict=True)]
    teacher = Teacher(model=first, engine="transformers", dtype="float32", batch_size=3, weight=5, ensemble=members)
    engine = exact_engine(teacher, Generate(max_tokens=7), sized(kind, 5))
    written = list(engine.generate([requests]))
    texts = [replace(request, completion_ids=made.ids.tolist()) for request, made in zip(requests, written, strict=True)]
    models = [load_model(model).double() for model in (first, *others)]
    for completions in (written, list(engine.score([texts]))):
        for completion, request in zip(completions, requests, strict=True):
            ids = torch.tensor([*request.prompt_ids, *completion.ids])
            with torch.inference_mode():
                each = [model(ids[None]).logits[0, len(request.prompt_ids) - 1 : -1, :VOCAB].softmax(-1) for model in models]
            mean = 0.5 * each[0] + 0.2 * each[1] + 0.3 * each[2]
            chosen = mean.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            np.testing.assert_allclose(completion.token_logprobs, chosen.log(), atol=5e-4)
            if kind == "topk":
                np.testing.assert_allclose(np.exp(completion.targets.logprobs_NK), mean.topk(5).values, rtol=1e-3)
            else:
                exact = np.arange(5) < completion.targets.exact_N[:, None]
                p_NK = mean.gather(1, torch.tensor(completion.targets.ids_NK)).numpy()
                np.testing.assert_allclose(np.exp(completion.targets.logweights_NK)[exact], p_NK[exact], rtol=2e-3)
    alone = exact_engine(teacher.model_copy(update={"ensemble": []}), Generate(max_tokens=7), Targets(kind=kind))
    one = next(alone.score([texts])).token_logprobs
    assert np.abs(one - written[0].token_logprobs).max() > 0.1, "one of them alone says something else"
