"""How often a judge prefers the student's answers: in both orders, with ties, and controlled for length.

Every pair is shown twice, with each answer first once, since judges prefer a position (Zheng et al. 2023, arXiv 2306.05685).
The verdict is the digit with the highest probability as the judge's first token; the judge generates nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmdistill.config import Experiment
from llmdistill.config.eval import WinRate
from llmdistill.curation.judge import DigitReader, as_text, read_template
from llmdistill.curation.steps import Failed
from llmdistill.data.ids import stable_id
from llmdistill.data.rows import Messages
from llmdistill.errors import InputError
from llmdistill.evaluation.across import prompt_ids_of
from llmdistill.evaluation.parts import Parts
from llmdistill.evaluation.statistics import Array, Draws, Estimate, check_clusters
from llmdistill.evaluation.writing import write_answers
from llmdistill.models.loading import load_tokenizer, vocabulary_hash
from llmdistill.runs.files import write_parquet
from llmdistill.runs.inputs import file_input
from llmdistill.runs.progress import StageBar, working
from llmdistill.teachers import fingerprints
from llmdistill.teachers.thinking import behind_trace

_TIE, _FIRST, _SECOND = 0, 1, 2
_RIDGE = 0.01  # on both coefficients; without it, there is no fit if one model or the longer answer always wins
_STEPS = 30  # of Newton's method, which needs about ten
_KEPT = 128  # verdicts are saved after this many questions
STUDENT = "student"


@dataclass(frozen=True)
class Answers:
    """What is compared: rows with one prompt each, and the answers of the student and the other model."""

    rows: list[dict[str, Any]]
    ours: list[str]
    theirs: list[str]


class Comparison:
    """A judge, and the models whose answers it compares.

    Attributes:
        inputs: path or name, and hash, of everything that the verdicts depend on.

    Raises:
        InputError: if a model or the template is missing, or the template is unusable.
    """

    def __init__(self, experiment: Experiment, settings: WinRate) -> None:
        self.experiment = experiment
        self.settings = settings
        if settings.against == "student, text only" and not experiment.train.compare_text_only:
            raise InputError("eval.win_rate.against is student, text only; that model needs train.compare_text_only")
        key = "eval.win_rate.template"
        self.template = read_template(settings.template, ("prompt", "answer_1", "answer_2"), key)
        models, _ = fingerprints(settings.judge, "eval.win_rate.judge")
        self.inputs = {**models, **file_input(settings.template, key)}

    @cached_property
    def reader(self) -> DigitReader:
        """The engine that asks the judge.

        Raises:
            InputError: if its engine is not installed, or a digit is not a single token.
        """
        try:
            return DigitReader(self.experiment, self.settings.judge, [_TIE, _SECOND])
        except InputError as error:
            raise InputError(f"eval.win_rate.judge: {error}") from None

    def check(self) -> None:
        """Refuse a judge that cannot be asked; loads its tokenizer.

        Raises:
            InputError: as for `reader`.
        """
        _ = self.reader

    def answers(
        self,
        models: Mapping[str, Any],
        rows: Any,
        conversations: Sequence[str],
        tokenizers: dict[str, Any],
        end_ids: dict[str, list[int]],
        parts: Parts,
    ) -> Answers:
        """Let both models answer.

        Args:
            models: the models by name; for a teacher that is not among them, the stored answers are used.
            rows: held-out rows, with `id`, `prompt`, `completion`, `input_ids` and `completion_start`.
            conversations: the conversation of each row.
            tokenizers: tokenizer of each model.
            end_ids: the tokens that end an answer of each.
            parts: where the answers are kept.
        """
        names = (STUDENT, self.settings.against)
        writers = [name for name in names if name in models]
        asked = _distinct(rows, conversations, self.settings.prompts, writers)
        size, longest = self.experiment.eval.batch_size, self.settings.max_tokens
        end = self.experiment.generate.thinking_end
        answers = {name: [_stored_answer(row, end) for row in asked] for name in names if name not in writers}
        files = {name: f"win-rate-answers-{number}" for number, name in enumerate(writers)}
        with StageBar("eval", len(writers) * len(asked), len(asked) * sum(map(parts.has, files.values()))) as bar:

            def answer(name: str) -> list[str]:
                prompts_ids = [prompt_ids_of(row, name) for row in asked]
                written = write_answers(models[name], prompts_ids, tokenizers[name], end_ids[name], size, longest, bar, end)
                return [each.text for each in written]

            answers |= {name: parts.result(file, partial(answer, name)) for name, file in files.items()}
        return Answers(asked, answers[STUDENT], answers[self.settings.against])

    def judged(self, answers: Answers, parts: Parts, directory: Path) -> dict[str, Any]:
        """Let the judge compare; write `verdicts.parquet`, and return the entry in `metrics.json`.

        Args:
            answers: answers of both models, whose memory the judge may need.
            parts: where the verdicts are kept.
            directory: directory of the stage.
        """
        prompts = [as_text(row["prompt"]) for row in answers.rows]
        table = self._verdicts([str(row["id"]) for row in answers.rows], prompts, answers.ours, answers.theirs, parts)
        table = table.append_column("conversation", pa.array([row["conversation"] for row in answers.rows]))
        write_parquet(directory / "verdicts.parquet", table)
        settings, eval_ = self.settings, self.experiment.eval
        result = win_rate(table, eval_.resamples, self.experiment.seed)
        warnings = [self._family_warning(), result.pop("warning")]
        return {
            "against": settings.against,
            "judge": {"model": settings.judge.model, "engine": settings.judge.engine},
            "template": settings.template,
            "max_tokens": settings.max_tokens,
            **result,
            "warnings": [text for text in warnings if text],
        }

    def _family_warning(self) -> str | None:
        """A judge favours text like its own (Panickssery et al. 2024, arXiv 2404.13076)."""
        teacher = self.experiment.teacher
        models, _ = fingerprints(teacher)
        if models[teacher.model] == self.inputs[self.settings.judge.model]:
            return "the judge is the teacher itself and favours its own text; choose a model from another family"
        if teacher.abilities.api and teacher.tokenizer is None:
            return None  # nothing is known of its family
        name, revision, key = self.experiment.tokenizer
        tokenizer = load_tokenizer(name, revision, teacher.trust_remote_code, key)
        if vocabulary_hash(tokenizer) == vocabulary_hash(self.reader.chat.tokenizer):
            return "the judge has the teacher's tokenizer and may favour its family; choose a model from another family"
        return None

    def _verdicts(self, ids: list[str], prompts: list[str], ours: list[str], theirs: list[str], parts: Parts) -> pa.Table:
        """One row per prompt, with both orders."""
        questions = []
        for number, (prompt, first, second) in enumerate(
            [*zip(prompts, ours, theirs, strict=True), *zip(prompts, theirs, ours, strict=True)]
        ):
            origin = f"held-out row {ids[number % len(ids)]}"
            questions.append((self.template.render({"prompt": prompt, "answer_1": first, "answer_2": second}, origin), origin))
        texts: list[str] = []
        digits: list[list[float] | None] = []
        with working("eval", "judging"):
            for start in range(0, len(questions), _KEPT):
                asked = questions[start : start + _KEPT]
                found = parts.result(f"win-rate-verdicts-{start // _KEPT}", partial(self._read, asked))
                texts += [text for text, _ in found]
                digits += [p for _, p in found]
        values = [
            _value(p.index(max(p)), student_first=number < len(ids)) if p and sum(p) >= self.settings.min_mass else None
            for number, p in enumerate(digits)
        ]
        half = len(ids)
        columns: dict[str, Any] = {"id": ids, "prompt": prompts, "student": ours, "rival": theirs}
        for name, part in (("student_first", slice(half)), ("student_second", slice(half, None))):
            columns[f"verdict_{name}"] = pa.array(values[part], pa.float64())
            columns[f"judge_{name}"] = texts[part]
            columns[f"digits_{name}"] = pa.array(digits[part], pa.list_(pa.float64()))
        return pa.table(columns)

    def _read(self, questions: list[tuple[Messages, str]]) -> list[tuple[str, list[float] | None]]:
        """The judge's first token after each question, with its probabilities of the digits; or why there is none, and None."""
        found: dict[int, tuple[str, list[float] | None]] = {}
        for place, done in self.reader.read(questions):
            if isinstance(done, Failed):
                found[place] = f"({done})", None
            else:
                text = self.reader.chat.template.decode(done.ids, special=True)
                found[place] = text, [*self.reader.probabilities(done).values()]
        return [found[place] for place in range(len(questions))]


def _stored_answer(row: dict[str, Any], end: str) -> str:
    """The teacher's text, without its reasoning trace."""
    return behind_trace("\n".join(str(message["content"]) for message in row["completion"]), end).strip()


def _value(digit: int, student_first: bool) -> float:
    """1 if the student's answer is preferred, 0 if the other's is, one half for a tie."""
    return 0.5 if digit == _TIE else float((digit == _FIRST) == student_first)


def _distinct(rows: Any, conversations: Sequence[str], count: int, writers: Sequence[str]) -> list[dict[str, Any]]:
    """The first row of each of the first prompts that the models' chat templates accept, with its `conversation`."""
    found: dict[str, dict[str, Any]] = {}
    for row, conversation in zip(rows, conversations, strict=True):
        if len(found) == count:
            break
        if not all(len(prompt_ids_of(row, name)) for name in writers):
            continue
        prompt = [{name: str(message[name]) for name in ("role", "content")} for message in row["prompt"]]
        found.setdefault(
            stable_id(prompt),
            {**row, "prompt": prompt, "conversation": conversation},
        )
    return list(found.values())


def win_rate(table: pa.Table, resamples: int, seed: int) -> dict[str, Any]:
    """Win rates with their intervals over prompts, from the verdicts of both orders.

    Args:
        table: one row per prompt, as in `verdicts.parquet`; a verdict is null if the judge gave none.
        resamples: number of bootstrap resamples.
        seed: their seed.

    The rates are None if there are verdicts on fewer than two prompts.
    """
    first, second = (table[f"verdict_{name}"].to_numpy() for name in ("student_first", "student_second"))
    judged = ~(np.isnan(first) | np.isnan(second))
    n = int(judged.sum())
    counted = {"prompts": n, "without_verdict": len(judged) - n}
    try:
        warning = check_clusters(n, "prompts with two verdicts", "choose another judge, or raise eval.win_rate.prompts")
    except InputError as error:  # found only at the end: keep the other results
        return {**counted, "win_rate": None, "length_controlled": None, "warning": str(error)}
    outcome = ((first + second) / 2)[judged]
    lengths = [pc.utf8_length(table[name]).to_numpy()[judged].astype(np.float64) for name in ("student", "rival")]
    conversations = table["conversation"].to_pylist() if "conversation" in table.column_names else range(len(judged))
    draws = Draws.of([name for name, counts in zip(conversations, judged, strict=True) if counts], resamples, seed)
    rate = draws.share(outcome, np.ones(n))
    # Where all outcomes are the same, the lengths explain nothing.
    same = np.ptp(outcome) == 0
    controlled = rate if same else asdict(length_controlled(outcome, lengths[0] - lengths[1], draws).interval(_sigmoid))
    return {
        **counted,
        "wins": int((outcome > 0.5).sum()),
        "ties": int((outcome == 0.5).sum()),
        "losses": int((outcome < 0.5).sum()),
        "win_rate": rate,
        "length_controlled": controlled,
        "characters": {"student": float(lengths[0].mean()), "rival": float(lengths[1].mean())},
        "orders_agree": float((first == second)[judged].mean()),
        "first_place_wins": float(((first + 1 - second) / 2)[judged].mean()),
        "warning": warning,
    }


def length_controlled(outcome: Array, longer: Array, draws: Draws) -> Estimate:
    """The logit of the win rate for answers of equal length, by logistic regression (Dubois et al. 2024, arXiv 2404.04475).

    P(win) = sigmoid(a + b·tanh(Δ/σ)) with Δ the difference in length and σ its standard deviation, as in AlpacaEval 2 but
    without the terms for each instruction's difficulty, which need the verdicts on many models. At Δ = 0 it is sigmoid(a). A
    weak ridge keeps the fit finite if one model or the longer answer always wins. The standard error of a is that of the
    sandwich estimator over clusters.

    Args:
        outcome: between 0 (lost) and 1 (won), for each prompt; shape (N,).
        longer: by how much the first model's answer is longer.
        draws: resamples of the conversations that the prompts belong to.
    """
    spread = longer.std()
    x = np.tanh(longer / spread) if spread > 0 else np.zeros(len(longer))
    by_cluster = np.vstack([np.ones(draws.draws.shape[1]), draws.draws])  # the first row is the measured sample
    weights = by_cluster[:, draws.cluster]
    a, b = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
        slope, curvature = weights * (outcome - p), weights * p * (1 - p)
        g_a, g_b = slope.sum(1) - _RIDGE * a, slope @ x - _RIDGE * b
        h_aa, h_ab, h_bb = curvature.sum(1) + _RIDGE, curvature @ x, curvature @ x**2 + _RIDGE
        determinant = h_aa * h_bb - h_ab**2
        step_a, step_b = (h_bb * g_a - h_ab * g_b) / determinant, (h_aa * g_b - h_ab * g_a) / determinant
        a, b = a + np.clip(step_a, -2, 2), b + np.clip(step_b, -2, 2)  # far from the optimum a whole step would overshoot
    clusters = by_cluster.shape[1]
    influence = (outcome - p) * (h_bb[:, None] - h_ab[:, None] * x) / determinant[:, None]
    member = np.eye(clusters)[draws.cluster]
    squares = (by_cluster * (influence @ member) ** 2).sum(1)
    errors = np.sqrt(squares * clusters / max(clusters - 1, 1))
    return Estimate(float(a[0]), float(errors[0]), a[1:], errors[1:], max(clusters - 1, 1))


def _sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-min(max(a, -700), 700)))
