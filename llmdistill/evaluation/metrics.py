"""The metrics of `eval`, one entry each: what is summed at every token, how it is computed from the sums, and how it is shown.

`evaluation/fidelity.py` sums the `quantities`, or `evaluation/text.py` those that do not need the teacher's weights;
`stages/evaluate.py` computes the values for `metrics.json`, and the reports and model cards show them. A metric in the first
table of the report (`tables` contains "models" or "text") is the mean of the quantity of the same name, and the student is
compared with its rivals by it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from llmdistill.evaluation import drafts
from llmdistill.evaluation.statistics import Array, Draws

Tensor = Any  # of torch, which is not imported here, as showing metrics does not need it
POSITIONS = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Lower bounds of groups of positions, in tokens from the start of the completion."""
ENTROPIES = (0.0, 0.05, 0.25, 0.5, 1.0, 2.0, 3.0)
"""Lower bounds of groups of positions by the entropy of the teacher, in nats."""
CONFIDENCES = 10
"""Number of equal-width groups by the probability of the model's most likely token."""
Table = Literal["models", "across", "text", "measures", "runs"]
_FEWEST = 5  # minimum number of conversations in a group of positions


@dataclass(frozen=True)
class Positions:
    """The teacher and a model at N completion tokens; the teacher's fields are None if its weights are not available.

    Attributes:
        log_p_NV: the teacher's log-probabilities.
        p_NV: its probabilities.
        p_top_N5: its most likely tokens.
        log_q_NV: the model's log-probabilities.
        labels_N: the token at each position.
        end_N: whether that token ends the completion.
        end_ids: the tokens that end a completion.
    """

    log_p_NV: Tensor
    p_NV: Tensor
    p_top_N5: Tensor
    log_q_NV: Tensor
    labels_N: Tensor
    end_N: Tensor
    end_ids: list[int]

    @cached_property
    def log_ratio_NV(self) -> Tensor:
        """The log-ratio, log p − log q."""
        return self.log_p_NV - self.log_q_NV

    @cached_property
    def q_top(self) -> Tensor:
        """The model's most likely tokens, `indices` and `values`, both (N, 5)."""
        return self.log_q_NV.topk(5)

    @cached_property
    def ends_N(self) -> Tensor:
        """The model's probability of an end token."""
        return self.log_q_NV[:, self.end_ids].exp().sum(-1)


@dataclass(frozen=True)
class Sums:
    """The sums of `fidelity` over the tokens of every row, for one model.

    Attributes:
        model: name of the model.
        measured: sums of all models.
        draws: resamples of the rows.
        text_bytes: length of each completion, in UTF-8.
        weights: importance weight of each row, if the text is a sample from the teacher.
    """

    model: str
    measured: dict[str, Array]
    draws: Draws
    text_bytes: Array | None = None
    weights: Array | None = None

    def __getitem__(self, quantity: str) -> Array:
        return self.measured[f"{self.model} {quantity}"]

    @property
    def tokens(self) -> Array:
        """Number of completion tokens in each row."""
        return self.measured["tokens"]

    @property
    def text_tokens(self) -> Array:
        """The same if vocabularies are equal; otherwise all of the model's own tokens, not only those compared."""
        return self.measured.get("positions", self.tokens)

    @property
    def text_nll(self) -> Array:
        """−log q of each completion in nats; if vocabularies differ, over all its tokens, not only those compared."""
        return self.measured.get(f"{self.model} text_nll", self.measured.get(f"{self.model} nll"))  # type: ignore[return-value]

    @property
    def ended(self) -> Array:
        """Whether each row's completion ends."""
        return self.measured["ended"]


@dataclass(frozen=True)
class Difference:
    """Wording of a difference between two models: its subject and unit, and a gain and a loss with a place for the number."""

    what: str
    unit: str
    gain: str
    loss: str


@dataclass(frozen=True)
class Metric:
    """A measure of a model.

    Attributes:
        name: name in `metrics.json`.
        label: label in tables.
        unit: unit in which it is shown.
        better: which values are better.
        compute: its value in `metrics.json`, from the sums; None if it is not defined.
        quantities: what is summed over tokens for it, each from the distributions there; shape (N,).
        factor: factor from the value to the unit.
        tables: where it has a column or row: the models of a report, or those with different vocabularies (`across`), or those
            without the teacher's weights (`text`), its further measures, the page that compares runs.
        definition: definition in model cards, where no note explains the label.
        difference: wording of a difference in it.
        of_text: whether it follows from the teacher's text or what was stored with it, without the teacher's weights.
        over: the sizes that it is a mean over, among the sums.
    """

    name: str
    label: str
    unit: str
    better: Literal["lower", "higher"] | None
    compute: Callable[[Sums], Any]
    quantities: Mapping[str, Callable[[Positions], Tensor]] = field(default_factory=dict)
    factor: int = 1
    tables: tuple[Table, ...] = ("measures",)
    definition: str = ""
    difference: Difference | None = None
    of_text: bool = False
    over: str = "tokens"

    @property
    def heading(self) -> str:
        """The unit, with an arrow towards better values."""
        return self.unit + {"lower": " ↓", "higher": " ↑", None: ""}[self.better]


def metrics_of(table: Table) -> list[Metric]:
    """The metrics of held-out text that a table shows."""
    return [metric for metric in METRICS if table in metric.tables]


def has_teacher(models: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the teacher is among the models of a `metrics.json`, which needs its weights."""
    return any(model["name"] == "teacher" for model in models)


def compared_by(teacher: bool, classes: bool) -> list[Metric]:
    """The metrics by which models are compared on held-out text.

    Args:
        teacher: whether the teacher's weights are available.
        classes: whether its vocabulary differs, so that tokens are compared by class.
    """
    return metrics_of("text" if not teacher else "across" if classes else "models")


def first_table(metrics: Mapping[str, Any]) -> list[Metric]:
    """The metrics in the first table of a report, from its `metrics.json`."""
    compared = compared_by(has_teacher(metrics["models"]), "classes" in metrics["held_out"])
    return [metric for metric in compared if all(metric.name in model for model in metrics["models"])]


def per_token(quantity: str) -> Callable[[Sums], dict[str, float]]:
    """The mean over tokens, with its interval."""
    return lambda sums: sums.draws.interval(sums[quantity], sums.tokens, least=0)


def per_token_share(quantity: str) -> Callable[[Sums], dict[str, float]]:
    """The share of tokens, with its interval; none for the teacher itself, for which it is 100% by definition."""

    def compute(sums: Sums) -> dict[str, float]:
        if sums.model == "teacher":
            mean = float(sums[quantity].sum() / sums.tokens.sum())
            return {"mean": mean, "low": mean, "high": mean}
        return sums.draws.share(sums[quantity], sums.tokens)

    return compute


def _stored_kl(sums: Sums) -> dict[str, float] | None:
    """Mean over the positions with stored targets; None if there are none."""
    if f"{sums.model} stored_kl" not in sums.measured or not sums.measured["stored"].any():
        return None
    return sums.draws.interval(sums["stored_kl"], sums.measured["stored"], least=0)


def _bits_per_byte(sums: Sums) -> dict[str, float]:
    assert sums.text_bytes is not None
    return sums.draws.interval(sums.text_nll / np.log(2), sums.text_bytes, least=0)


def _draft(sums: Sums) -> dict[str, Any] | None:
    """The model as the teacher's draft model, with each mode's acceptance also by position; None if vocabularies differ."""
    if f"{sums.model} text_nll" in sums.measured:
        return None
    found = drafts.figures(sums.model, sums.measured, sums.draws)
    for mode, figures in found.items():
        groups = zip(POSITIONS, sums[f"{mode} by position"].T, sums.measured["tokens by position"].T, strict=True)
        figures["by_position"] = [
            {"from": begin, "tokens": int(tokens.sum()), **sums.draws.share(accepted, tokens)}
            for begin, accepted, tokens in groups
            if np.count_nonzero(sums.draws.sums(tokens)) >= _FEWEST
        ]
    return found


def _kl_by(group: str, begins: tuple[float, ...]) -> Callable[[Sums], list[dict[str, Any]]]:
    """KL by group of positions, for groups with enough conversations."""

    def compute(sums: Sums) -> list[dict[str, Any]]:
        kl_RG, tokens_RG = sums[f"kl by {group}"], sums.measured[f"tokens by {group}"]
        return [
            {"from": begin, "tokens": int(tokens.sum()), **sums.draws.interval(kl, tokens, least=0)}
            for begin, kl, tokens in zip(begins, kl_RG.T, tokens_RG.T, strict=True)
            if np.count_nonzero(sums.draws.sums(tokens)) >= _FEWEST
        ]

    return compute


def _end(sums: Sums) -> dict[str, float] | None:
    if np.count_nonzero(sums.draws.sums(sums.ended)) < _FEWEST:
        return None
    return sums.draws.share(sums["end"], sums.ended)


def _calibration_error(sums: Sums) -> dict[str, float]:
    """How far q of the model's choice is from p of it: Σ |confidence − truth| over groups of positions by that q.

    Without an interval: noise increases it, and increases it again in every resample, so that a bootstrap interval would lie
    above it.
    """
    gap_G = (sums["confidence"] - sums["truth"]).sum(axis=0)
    return {"mean": float(np.abs(gap_G).sum() / sums.tokens.sum())}


def _sequence_kl(sums: Sums) -> dict[str, float] | None:
    """KL(teacher ‖ model) over whole texts, in nats per text, by importance weights; None if the text is not a sample."""
    if sums.weights is None:
        return None
    # log p(y|x) − log q(y|x), both from weights in this process
    nats = sums.text_nll - Sums("teacher", sums.measured, sums.draws).text_nll
    return sums.draws.interval(sums.weights * nats, sums.weights)


METRICS = (
    Metric(
        "kl",
        "KL from the teacher",
        "nats per token",
        "lower",
        compute=per_token("kl"),
        quantities={"kl": lambda at: (at.p_NV * at.log_ratio_NV).sum(-1)},
        tables=("models", "across", "runs"),
        definition="KL(teacher ‖ student)",
        difference=Difference("KL", "nats per token", "It is {} closer to the teacher", "It is {} farther from the teacher"),
    ),
    Metric(
        "reverse_kl",
        "KL(model ‖ teacher)",
        "nats per token",
        "lower",
        compute=per_token("reverse_kl"),
        quantities={"reverse_kl": lambda at: -(at.log_q_NV.exp() * at.log_ratio_NV).sum(-1)},
    ),
    Metric(
        "top1",
        "same next token",
        "%",
        "higher",
        compute=per_token_share("top1"),
        quantities={"top1": lambda at: at.p_top_N5[:, 0] == at.q_top.indices[:, 0]},
        factor=100,
        tables=("models", "across", "runs"),
        definition="same most likely token",
        difference=Difference(
            "next-token choices",
            "percentage points",
            "It makes the teacher’s choice {} more often",
            "It makes the teacher’s choice {} less often",
        ),
    ),
    Metric(
        "top5",
        "overlap of the five most likely tokens",
        "%",
        "higher",
        compute=per_token_share("top5"),
        quantities={"top5": lambda at: (at.p_top_N5[:, :, None] == at.q_top.indices[:, None, :]).any(2).float().mean(1)},
        factor=100,
    ),
    Metric(
        "nll",
        "NLL of its text",
        "nats per token",
        "lower",
        compute=per_token("nll"),
        quantities={"nll": lambda at: -at.log_q_NV.gather(1, at.labels_N[:, None])[:, 0]},
        tables=("models", "text"),
        of_text=True,
        definition="NLL of the teacher's text",
        difference=Difference(
            "NLL", "nats per token", "It predicts the teacher’s text better by {}", "It predicts the teacher’s text worse by {}"
        ),
    ),
    Metric(
        "bits_per_byte",
        "length of the teacher’s text",
        "bits per byte",
        "lower",
        compute=_bits_per_byte,
        tables=("measures", "across", "text"),
        of_text=True,
        definition="bits per byte of the teacher's text",
        difference=Difference(
            "bits per byte",
            "bits per byte",
            "It predicts the teacher’s text better by {}",
            "It predicts the teacher’s text worse by {}",
        ),
    ),
    Metric(
        "written",
        "the written token is its most likely one",
        "%",
        "higher",
        compute=lambda sums: sums.draws.share(sums["written"], sums.tokens),
        quantities={"written": lambda at: at.q_top.indices[:, 0] == at.labels_N},
        factor=100,
        tables=("measures", "text"),
        of_text=True,
        definition="the token that the teacher wrote is the most likely one",
        difference=Difference(
            "the tokens that the teacher wrote",
            "percentage points",
            "The teacher’s token is its most likely one {} more often",
            "The teacher’s token is its most likely one {} less often",
        ),
    ),
    Metric(
        "stored_kl",
        "KL over the stored tokens",
        "nats per token",
        "lower",
        compute=_stored_kl,
        tables=("text",),
        of_text=True,
        over="stored",
        definition="KL(teacher ‖ student) over the stored tokens and the rest as one, which is at most the whole KL",
        difference=Difference(
            "KL over the stored tokens",
            "nats per token",
            "Over the stored tokens it is {} closer to the teacher",
            "Over the stored tokens it is {} farther from the teacher",
        ),
    ),
    Metric("kl_by_position", "KL by position", "nats per token", "lower", compute=_kl_by("position", POSITIONS), tables=()),
    Metric(
        "kl_by_entropy", "KL by the teacher’s entropy", "nats per token", "lower", compute=_kl_by("entropy", ENTROPIES), tables=()
    ),
    Metric(
        "calibration_error",
        "calibration error against the teacher",
        "%",
        "lower",
        compute=_calibration_error,
        quantities={
            "confidence": lambda at: at.q_top.values[:, 0].exp(),
            "truth": lambda at: at.log_p_NV.gather(1, at.q_top.indices[:, :1])[:, 0].exp(),
        },
        factor=100,
    ),
    Metric(
        "end",
        "probability of the end token where the teacher ended",
        "%",
        None,
        compute=_end,
        quantities={"end": lambda at: at.ends_N * at.end_N},
        factor=100,
        of_text=True,
    ),
    Metric(
        "early_end",
        "probability of the end token where it continued",
        "%",
        None,
        compute=lambda sums: sums.draws.share(sums["early"], sums.tokens - sums.ended),
        quantities={"early": lambda at: at.ends_N * ~at.end_N},
        factor=100,
        of_text=True,
    ),
    Metric(
        "draft",
        "as a draft model",
        "",
        None,
        compute=_draft,
        quantities={
            # As one minus the total variation it is exactly one for equal distributions, which a sum of probabilities is not.
            "overlap": lambda at: 1 - (at.p_NV - at.log_q_NV.exp()).abs().sum(-1) / 2,
            "collision": lambda at: (at.p_NV * at.log_q_NV.exp()).sum(-1),
        },
        tables=(),
    ),
    Metric("sequence_kl", "KL over whole texts", "nats per text", "lower", compute=_sequence_kl, tables=()),
)
"""Metrics of the held-out text."""

OWN_TEXT_METRICS = (
    Metric("reverse_kl", "KL(model ‖ teacher) on its own text", "nats per token", "lower", compute=per_token("reverse_kl")),
    Metric(
        "teacher_bits_per_byte",
        "length of the model’s own text, to the teacher",
        "bits per byte",
        "lower",
        compute=lambda sums: _bits_per_byte(Sums("teacher", sums.measured, sums.draws, sums.text_bytes)),
    ),
    Metric(
        "teacher_nll",
        "the teacher’s NLL of the model’s own text",
        "nats per token",
        "lower",
        compute=lambda sums: sums.draws.interval(sums.measured["teacher nll"], sums.tokens, least=0),
    ),
    Metric(
        "length",
        "length of its own answers",
        "tokens",
        None,
        compute=lambda sums: sums.draws.interval(sums.text_tokens, np.ones(len(sums.tokens)), least=0),
    ),
    Metric(
        "ended",
        "own answers that ended with the end token",
        "%",
        None,
        compute=lambda sums: sums.draws.share(sums.ended, np.ones(len(sums.tokens))),
        factor=100,
    ),
)
"""Metrics of a model's own answers, under `own_text`."""

QUANTITIES = {name: quantity for metric in METRICS for name, quantity in metric.quantities.items()}
"""All quantities summed over tokens."""

QUANTITIES_OF_TEXT = {name: quantity for metric in METRICS if metric.of_text for name, quantity in metric.quantities.items()}
"""Quantities that do not need the teacher's distribution."""
