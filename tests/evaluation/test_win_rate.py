import re
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.optimize

from llmdistill.config import Experiment
from llmdistill.curation import judge
from llmdistill.data.targets import TopK
from llmdistill.errors import InputError
from llmdistill.evaluation import win_rate
from llmdistill.evaluation.parts import Parts
from llmdistill.evaluation.statistics import Draws
from llmdistill.evaluation.win_rate import Comparison, length_controlled
from llmdistill.evaluation.writing import Written
from llmdistill.models.loading import load_model, load_tokenizer
from llmdistill.teachers import Completion


class StubJudge:
    """A double of an engine: it gives the digit that a function of the two answers names, with a probability."""

    def __init__(self, tokenizer, prefers, probability=0.9):
        self.tokenizer = tokenizer
        self.prefers = prefers
        self.probability = probability

    def generate(self, batches):
        for batch in batches:
            for request in reversed(batch):  # in another order than asked
                text = self.tokenizer.decode(request.prompt_ids)
                first, second = re.findall(r'<answer number="\d">\n(.*?)\n</answer>', text, re.DOTALL)
                token = self.tokenizer.encode(str(self.prefers(first, second)), add_special_tokens=False)[0]
                logprobs = np.log([[self.probability, 1 - self.probability]]).astype(np.float16)
                targets = TopK(np.array([[token, 0]]), logprobs, np.zeros(1))
                yield Completion(request.index, np.array([token]), "length", np.zeros(1), targets)


def experiment(tiny, directory, **settings):
    section = {"judge": {"model": str(tiny), "engine": "transformers"}, "against": "teacher", **settings}
    tree = {"output": str(directory), "teacher": {"model": str(tiny)}, "eval": {"win_rate": section, "resamples": 200}}
    return Experiment.model_validate(tree)


def compared(tiny, directory, monkeypatch, pairs, prefers, probability=0.9, **settings):
    """What is measured where the student and the teacher answer these pairs."""
    wanted = experiment(tiny, directory, **settings)
    tokenizer = load_tokenizer(str(tiny), None)
    monkeypatch.setattr(judge, "open_engine", lambda *_: StubJudge(tokenizer, prefers, probability))
    answers = {name: [pair[place] for pair in pairs] for place, name in enumerate(("the student", "the teacher"))}
    monkeypatch.setattr(win_rate, "write_answers", lambda model, prompts, *_: [Written(text, []) for text in answers[model]])
    ids = {"input_ids": np.array([3, 4]), "completion_start": 1}
    rows = [{"id": f"r{n}", "prompt": [{"role": "user", "content": f"question {n}"}], **ids} for n in range(len(pairs))]
    models = {"student": "the student", "teacher": "the teacher"}
    tokenizers, ends = (dict.fromkeys(models, value) for value in (tokenizer, [2]))
    conversations = [row["id"] for row in rows]
    comparison, parts = Comparison(wanted, wanted.eval.win_rate), Parts(directory / "parts")
    answers = comparison.answers(models, rows, conversations, tokenizers, ends, parts)
    return comparison.judged(answers, parts, directory)


def better(first, second):
    """Whoever is called better; a tie if both are."""
    return 0 if ("better" in first) == ("better" in second) else 1 if "better" in first else 2


def test_known_preferences(tiny, tmp_path, monkeypatch):
    pairs = [("better", "worse")] * 20 + [("worse", "better")] * 12 + [("better", "better")] * 8
    got = compared(tiny, tmp_path, monkeypatch, pairs, better)
    assert (got["prompts"], got["wins"], got["ties"], got["losses"], got["without_verdict"]) == (40, 20, 8, 12, 0)
    assert got["win_rate"]["mean"] == (20 + 4) / 40
    assert got["win_rate"]["low"] < 0.6 < got["win_rate"]["high"]
    assert got["orders_agree"] == 1
    assert got["first_place_wins"] == 0.5
    assert got["against"] == "teacher"
    rows = pq.read_table(tmp_path / "verdicts.parquet").to_pylist()
    assert [row["id"] for row in rows] == [f"r{n}" for n in range(40)]
    assert (rows[0]["prompt"], rows[0]["student"], rows[0]["rival"]) == ("question 0", "better", "worse")
    for number, value, shown in ((0, 1, ("1", "2")), (20, 0, ("2", "1")), (39, 0.5, ("0", "0"))):
        row = rows[number]
        assert row["verdict_student_first"] == row["verdict_student_second"] == value
        assert (row["judge_student_first"].strip(), row["judge_student_second"].strip()) == shown
        assert row["digits_student_first"][int(shown[0])] == pytest.approx(0.9, rel=1e-3)


def test_a_judge_that_only_sees_the_place_says_nothing(tiny, tmp_path, monkeypatch):
    got = compared(tiny, tmp_path, monkeypatch, [("a", "b")] * 30, lambda first, second: 1)
    assert (got["wins"], got["ties"], got["losses"]) == (0, 30, 0)
    # Agresti and Coull's four items deviate by one half, the thirty by nothing; 2.04523 is Student's quantile.
    half = 2.04523 / 34
    assert got["win_rate"] == pytest.approx({"mean": 0.5, "low": 0.5 - half, "high": 0.5 + half}, abs=1e-6)
    assert got["length_controlled"] == got["win_rate"]
    assert got["orders_agree"] == 0
    assert got["first_place_wins"] == 1


def test_a_judge_that_gives_no_verdict(tiny, tmp_path, monkeypatch):
    got = compared(tiny, tmp_path, monkeypatch, [("better", "worse")] * 3, better, probability=0.3)
    assert (got["prompts"], got["without_verdict"], got["win_rate"]) == (0, 3, None)
    assert any("0 prompts with two verdicts, but an interval needs at least 2" in text for text in got["warnings"])


def test_answers_too_long_for_the_judge_have_no_verdict(tiny, tmp_path, monkeypatch):
    settings = {"judge": {"model": str(tiny), "engine": "transformers", "max_model_len": 230}}
    pairs = [("better", "worse")] * 4 + [("better " * 200, "worse")]
    got = compared(tiny, tmp_path, monkeypatch, pairs, better, **settings)
    assert (got["prompts"], got["without_verdict"]) == (4, 1)
    last = pq.read_table(tmp_path / "verdicts.parquet").to_pylist()[-1]
    assert last["verdict_student_first"] is None
    assert re.fullmatch(r"\(\d+ tokens are too long for the judge\)", last["judge_student_first"])


def test_a_refusal_of_the_judge_is_no_verdict_and_what_was_judged_is_kept(tiny, tmp_path, monkeypatch):
    """An endpoint may give up one answer, or be gone in the middle; what it has answered is paid."""
    asked = []

    class Endpoint(StubJudge):
        def generate(self, batches):
            for request in batches[0]:
                if len(asked) == 4:
                    raise ConnectionError
                asked.append(request.index)
                if "refused" in self.tokenizer.decode(request.prompt_ids):
                    nothing = np.empty(0, dtype=np.int64)
                    yield Completion(request.index, nothing, "failed", nothing, None, failed="a refusal (message.refusal)")
                else:
                    yield from super().generate([[request]])

    monkeypatch.setattr(win_rate, "_KEPT", 3)
    monkeypatch.setattr(sys.modules[__name__], "StubJudge", Endpoint)
    pairs = [("better", "worse"), ("better", "refused"), ("better", "worse")]
    with pytest.raises(ConnectionError):
        compared(tiny, tmp_path, monkeypatch, pairs, better)
    assert len(asked) == 4
    asked.append(None)  # the endpoint is back
    got = compared(tiny, tmp_path, monkeypatch, pairs, better)
    assert asked[5:] == [0, 1, 2]  # of the second part alone
    assert (got["prompts"], got["without_verdict"], got["wins"]) == (2, 1, 2)
    refused = pq.read_table(tmp_path / "verdicts.parquet").to_pylist()[1]
    assert refused["judge_student_first"] == "(the judge gave no answer: a refusal (message.refusal))"


def test_a_prompt_that_a_template_refuses_is_not_judged(tiny, tmp_path, monkeypatch):
    rows = [{"prompt": [{"role": "user", "content": str(n)}], "main_prompt": [1] if n else []} for n in range(3)]
    ids = {"input_ids": np.array([3, 4]), "completion_start": 1}
    found = win_rate._distinct([row | ids for row in rows], list("abc"), 2, ["student", "teacher"])
    assert [row["conversation"] for row in found] == ["b", "c"]


def test_the_teacher_as_its_own_judge_is_told(tiny, tmp_path, monkeypatch):
    got = compared(tiny, tmp_path, monkeypatch, [("better", "worse")] * 30, better)
    (warning,) = got["warnings"]
    assert warning.startswith("the judge is the teacher itself")
    other = tmp_path / "other"  # another model with the same tokenizer
    model = load_model(str(tiny))
    model.config.rms_norm_eps *= 2
    model.save_pretrained(other)
    load_tokenizer(str(tiny), None).save_pretrained(other)
    settings = {"judge": {"model": str(other), "engine": "transformers"}}
    (warning,) = compared(tiny, tmp_path, monkeypatch, [("better", "worse")] * 30, better, **settings)["warnings"]
    assert warning.startswith("the judge has the teacher's tokenizer")


def test_only_the_first_of_a_prompts_rows_counts(tiny, tmp_path):
    prompts = [np.array([{"role": np.str_("user"), "content": np.str_(text)}]) for text in "aabcd"]  # as a dataset may give them
    rows = [{"id": str(n), "prompt": prompt} for n, prompt in enumerate(prompts)]
    assert [row["id"] for row in win_rate._distinct(rows, "abcde", 3, [])] == ["0", "2", "3"]


def controlled_rate(outcome, longer):
    """As a share, of prompts that have nothing to do with each other."""
    draws = Draws.of([str(n) for n in range(len(outcome))], 2, 0)
    return 1 / (1 + np.exp(-length_controlled(outcome, longer, draws).value))


def test_where_length_alone_decides_the_controlled_rate_is_one_half():
    generator = np.random.default_rng(1)
    longer = generator.normal(120, 200, 400)  # the student writes more, and the judge likes it
    outcome = (longer > 0).astype(float)
    assert outcome.mean() > 0.7
    assert controlled_rate(outcome, longer) == pytest.approx(0.5, abs=0.05)
    noisy = (generator.random(400) < 1 / (1 + np.exp(-longer / 150))).astype(float)
    assert controlled_rate(noisy, longer) == pytest.approx(0.5, abs=0.08)


def test_where_length_does_not_matter_the_controlled_rate_is_the_win_rate():
    generator = np.random.default_rng(2)
    longer = generator.normal(100, 100, 2000)
    outcome = generator.choice([0, 0.5, 1], size=2000, p=[0.2, 0.2, 0.6])
    assert controlled_rate(outcome, longer) == pytest.approx(outcome.mean(), abs=0.04)


@pytest.mark.parametrize("seed", range(4))
def test_the_fit_is_the_one_that_scipy_finds(seed):
    generator = np.random.default_rng(seed)
    longer, outcome = generator.normal(30, 80, 50), generator.choice([0, 0.25, 0.5, 1], size=50)
    draws = Draws.of([str(n) for n in range(50)], 3, seed)
    x = np.tanh(longer / longer.std())

    def loss(coefficients, weight):
        z = coefficients[0] + coefficients[1] * x
        return (weight * (np.logaddexp(0, z) - outcome * z)).sum() + 0.005 * (coefficients**2).sum()

    want = [scipy.optimize.minimize(loss, np.zeros(2), (weight,), tol=1e-10).x[0] for weight in draws.draws]
    np.testing.assert_allclose(length_controlled(outcome, longer, draws).values, want, atol=1e-4)


def test_the_fit_is_finite_where_one_always_wins():
    lengths = np.arange(40.0)
    assert 0.98 < controlled_rate(np.ones(40), lengths - 20) < 1
    assert controlled_rate(np.ones(40), np.zeros(40)) > 0.98
    assert controlled_rate(np.full(40, 0.5), lengths) == pytest.approx(0.5)


def test_what_cannot_compare_is_refused(tiny, tmp_path):
    wanted = experiment(tiny, tmp_path, against="student, text only")
    with pytest.raises(InputError, match=r"eval\.win_rate\.against is student, text only; that model needs"):
        Comparison(wanted, wanted.eval.win_rate)
    wanted = experiment(tiny, tmp_path, judge={"model": "./nowhere", "engine": "transformers"})
    with pytest.raises(InputError, match=r"eval\.win_rate\.judge\.model: \./nowhere"):
        Comparison(wanted, wanted.eval.win_rate)
    wanted = experiment(tiny, tmp_path, template="prompts/judge.yaml")
    with pytest.raises(InputError, match=r"needs the field answer, a judge's template gets prompt, answer_1 and answer_2"):
        Comparison(wanted, wanted.eval.win_rate)
