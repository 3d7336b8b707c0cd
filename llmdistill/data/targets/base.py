"""The interface of a kind of soft targets: which tokens it keeps, its form on disk and in a batch, and its loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from llmdistill.data.targets.columns import Array, joined

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from llmdistill.losses import Objective


@dataclass(frozen=True)
class MemberTokens:
    """The tokens that the M members of an ensemble kept at N positions, with each member's log-probabilities of all.

    Attributes:
        ids_MNK: the tokens that each member kept by its own distribution.
        logprobs_LMNK: the log-probability by every member (L, as many as M) of every token that any of them kept (M, K).
        log_weights_M: of the members in the mean; natural logarithms of numbers that add up to one.
    """

    ids_MNK: Array
    logprobs_LMNK: Array
    log_weights_M: Array

    @property
    def mean_MNK(self) -> Array:
        """The log-probability of every token under the mean."""
        weighted = self.logprobs_LMNK.astype(np.float64) + self.log_weights_M[:, None, None, None]
        mean: Array = np.logaddexp.reduce(weighted, axis=0)
        return mean

    def merged(self, weights_MNK: Array) -> tuple[Array, Array, Array]:
        """The distinct tokens of each position: ids, sums of weights and log-probability by the mean, (N, M·K) each.

        Where a position has fewer, the last ones weigh nothing and have the log-probability −inf.
        """
        ids_NJ, weights_NJ, mean_NJ = (_side_by_side(values) for values in (self.ids_MNK, weights_MNK, self.mean_MNK))
        order_NJ = np.argsort(ids_NJ, axis=1, kind="stable")
        ids_NJ, weights_NJ, mean_NJ = (np.take_along_axis(values, order_NJ, 1) for values in (ids_NJ, weights_NJ, mean_NJ))
        is_first_NJ = np.diff(ids_NJ, axis=1, prepend=-1) != 0
        at = np.arange(len(ids_NJ))[:, None], is_first_NJ.cumsum(axis=1) - 1
        distinct_NJ, sums_NJ, logprobs_NJ = np.zeros_like(ids_NJ), np.zeros(ids_NJ.shape), np.full(ids_NJ.shape, -np.inf)
        distinct_NJ[at], logprobs_NJ[at] = ids_NJ, mean_NJ
        np.add.at(sums_NJ, at, weights_NJ)
        return distinct_NJ, sums_NJ, logprobs_NJ


def _side_by_side(values_MNK: Array) -> Array:
    side_by_side: Array = np.concatenate(list(values_MNK), axis=1)
    return side_by_side


@dataclass(frozen=True)
class SoftTargets(ABC):
    """Soft targets of one kind at N positions: arrays whose first dimension is N; every kind has `ids_NK`.

    The class says what is particular to the kind; what asks for it is named at each attribute and method. It imports
    torch inside of methods alone: reading a dataset and a dry run need none.
    """

    ids_NK: Array

    name: ClassVar[str]
    """The value of `targets.kind`, and what `dataset.json` and a batch call it."""
    summary: ClassVar[str]
    """For the help of `targets.kind`, in a few words."""
    size: ClassVar[Literal["n", "k"] | None] = None
    """Key of the section `targets` for the number of tokens kept per position; None if none are."""
    columns: ClassVar[tuple[str, ...]]
    """Columns of a shard; they begin with `target_`."""
    one_each: ClassVar[tuple[str, ...]] = ()
    """Columns with one value per position."""
    ranges: ClassVar[dict[str, tuple[float, float]]] = {}
    """The least and the largest value that a column can hold; NaN is none."""
    of_writer: ClassVar[bool] = False
    """Whether their tokens are those that the model that wrote the text has drawn, of which another one says what it thinks."""
    of_text: ClassVar[bool] = False
    """Whether they are made of the log-probabilities of the written tokens, and not of a distribution."""
    most_likely: ClassVar[bool] = False
    """Whether the kept tokens are the most likely ones, which every engine can name; others are chosen inside the engine."""
    distinct: ClassVar[bool] = True
    """Whether the kept tokens of a position all differ; where they do not, the number of stored ones varies."""
    unbiased: ClassVar[bool] = False
    """Whether weighted sums over the kept tokens equal those over the vocabulary in expectation."""
    over_classes: ClassVar[bool] = True
    """Whether they can be converted to classes of tokens (`of_classes`), for a student with a different tokenizer."""
    has_tail: ClassVar[bool] = False
    """Whether what is outside the kept tokens is one more outcome of the loss; see `loss_parts`."""
    relative_error: ClassVar[float] = 0
    """The largest of a stored log-probability."""
    bytes_per_token: ClassVar[float] = 0
    """About what one kept token takes in Parquet with zstd, for estimates."""

    def __len__(self) -> int:
        return len(self.ids_NK)

    # Keeping: what the engines ask.

    @classmethod
    def uniforms(cls, n: int) -> int:
        """Number of random numbers that `keep` needs per position."""
        return 0

    @classmethod
    @abstractmethod
    def keep(cls, logprobs_NV: "Tensor", n: int, uniform_NU: "Tensor") -> "Tensor":
        """The ids to keep at each position, shape (N, n).

        Args:
            logprobs_NV: the full distributions, natural logarithms.
            n: tokens kept or drawn.
            uniform_NU: numbers in [0, 1), as many a position as `uniforms` says.
        """

    @classmethod
    @abstractmethod
    def from_kept(cls, ids_NK: Array, logprobs_NK: Array) -> "SoftTargets | None":
        """Targets from the tokens of `keep` and their log-probabilities; None if nothing is stored."""

    # Mixing: what an ensemble asks whose members are read one after the other.

    @classmethod
    def of_member(cls, n: int) -> int:
        """Number of tokens that each member keeps, by `keep`, if the mixture is to have n."""
        return n

    @classmethod
    def mix(cls, members: "MemberTokens", n: int, uniform_NU: Array) -> "SoftTargets | None":
        """The targets of the mean of several teachers' distributions, from what each of them kept.

        Args:
            members: what they kept.
            n: tokens kept or drawn.
            uniform_NU: numbers in [0, 1), as many a position as `uniforms` says, independent of those that the members kept by.
        """
        raise NotImplementedError(f"targets of kind {cls.name} of several teachers")

    # Storing: what shards, the collator and exports ask.

    @classmethod
    @abstractmethod
    def encode(cls, sequences: Sequence[Self], vocab_size: int) -> "dict[str, pa.Array]":
        """The `columns` of a shard, one list per sequence, from flat buffers."""

    @classmethod
    @abstractmethod
    def truncate(cls, row: Mapping[str, Any], positions: int) -> dict[str, Array]:
        """The flat `columns` of a stored row for its first positions."""

    @classmethod
    @abstractmethod
    def decode(cls, columns: Mapping[str, Array]) -> Self:
        """The targets of a range of positions from their flat columns, from `truncate`; weights add up to one."""

    @classmethod
    def sizes(cls, columns: Mapping[str, Array], positions: int) -> dict[str, Array]:
        """Number of values at each position, (N,) each, in the columns that are not `one_each`, from the flat columns."""
        return {}

    @classmethod
    def wrong_position(cls, columns: Mapping[str, Array], row_N: Array) -> tuple[int, str] | None:
        """The first position with invalid values, and why; None if there is none.

        Args:
            columns: flat, as `decode` takes them, with sizes that fit each other.
            row_N: the number of each position's row.
        """
        return None

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]], positions: Sequence[int] | Array) -> Self:
        """The targets of stored rows, concatenated, each for its first positions."""
        parts = [cls.truncate(row, count) for row, count in zip(rows, positions, strict=True)]
        return cls.decode({name: np.concatenate([part[name] for part in parts]) for name in cls.columns})

    @staticmethod
    def together(parts: "Sequence[SoftTargets]") -> "SoftTargets":
        """Concatenate targets of one kind with the same number of tokens per position."""
        return type(parts[0])(*(joined(parts, field.name) for field in fields(parts[0])))

    def after(self, start: int) -> Self:
        """The targets of all positions but the first `start`."""
        return self.at(slice(start, None))

    def at(self, places: Array | slice) -> Self:
        """The targets of some positions, in this order."""
        return type(self)(*(getattr(self, field.name)[places] for field in fields(self)))

    def of_classes(self, class_V: Array, dropped: int | None = None) -> Self:
        """The same over classes of tokens: `ids_NK` are classes, each with what its tokens weigh together.

        Args:
            class_V: the class of each token.
            dropped: a class that is left out; what it weighs goes to the tail, or to the others where there is none.

        Raises:
            ValueError: if this kind cannot be converted to classes.
        """
        raise ValueError(f"targets of kind {self.name} cannot be converted to classes of tokens")

    def within(self, vocab_size: int) -> Self:
        """The same without tokens from `vocab_size` on, which are padding of an output layer.

        Their probability goes to the tail, or to the other tokens where there is none. In their place stands another id
        that weighs nothing.

        Raises:
            ValueError: there are some, and this kind cannot do without them.
        """
        if (self.ids_NK >= vocab_size).any():
            raise ValueError(f"targets of kind {self.name} contain tokens that the student does not have")
        return self

    @abstractmethod
    def logweights(self) -> Array:
        """Natural logarithms of the weights of the tokens in `ids_NK`, (N, K); −inf for no token."""

    def told(self) -> Array:
        """The teacher's log-probabilities that they contain, or of their sums; −inf for none."""
        return self.logweights()

    def outcomes(self) -> Array:
        """The probabilities of all stored outcomes, (N, J): of the tokens and, if there is one, of the tail."""
        return np.exp(self.logweights())

    def entropies(self) -> Array:
        """The teacher's uncertainty at each position, in nats: the entropy of `outcomes`, at most log J.

        Where it follows from the distribution alone, it is without the luck of a draw: of tokens that share a weight, it
        counts each.
        """
        p_NJ = self.outcomes()
        entropy_N: Array = -(p_NJ * np.log(np.maximum(p_NJ, 1e-30))).sum(axis=1)
        return np.maximum(entropy_N, 0)

    # Telling: what `dataset.json`, cards, `inspect` and `train` say.

    @classmethod
    def describe(cls, n: int) -> dict[str, Any]:
        """The entry of the targets in `dataset.json`.

        Args:
            n: tokens kept per position.
        """
        if cls.size is None:
            return {"kind": cls.name}
        return {"kind": cls.name, cls.size: n, "unbiased": cls.unbiased, "relative_error": cls.relative_error}

    @classmethod
    @abstractmethod
    def sentence(cls, described: Mapping[str, Any]) -> str:
        """A sentence for a card, from the result of `describe`."""

    @classmethod
    def facts(cls, described: Mapping[str, Any], column: Callable[[str], Array]) -> dict[str, str]:
        """Further facts for `inspect`, besides the size.

        Args:
            described: what `describe` gave.
            column: the values of a column by its name, in some of the rows.
        """
        return {}

    @classmethod
    def warning(cls, table: "pa.Table") -> str | None:
        """Problems with the targets of some rows, and what would be better."""
        return None

    # Learning: what the configuration, the collator and the losses ask.

    @classmethod
    def refuses(cls, loss: str, temperature: float) -> str | None:
        """Why a loss cannot use such targets, beginning with the name of the setting; None if it can.

        Args:
            loss: the divergence, one of `losses.DIVERGENCES`.
            temperature: of both distributions inside it.
        """
        return None

    @abstractmethod
    def batch(self) -> dict[str, Array]:
        """What the collator puts into a batch: `target_ids` (N, K), and more whose names begin with `target_`."""

    @classmethod
    def present(cls, picked_NK: "Tensor", rest_N1: "Tensor", batch: Mapping[str, Any]) -> "tuple[Tensor, Tensor]":
        """The student's logits of `target_ids`, as good as −inf where a place holds no token, and of the others.

        Args:
            picked_NK: its logits of `target_ids`.
            rest_N1: the log-sum-exp of its other logits if the kind has a tail, else that of all.
            batch: of the collator.
        """
        return picked_NK, rest_N1

    @classmethod
    @abstractmethod
    def loss_parts(
        cls, picked_NK: "Tensor", rest_N1: "Tensor", batch: Mapping[str, Any], objective: "Objective"
    ) -> "dict[str, Tensor]":
        """The parts of the loss, by name, of shape (N,): the divergence and always forward KL, as `kl`.

        Args:
            picked_NK: the student's logits of `target_ids`, in float32 or float64, as `present` gives them.
            rest_N1: the log-sum-exp of its other logits if the kind has a tail, else that of all.
            batch: of the collator.
            objective: what to compute.
        """

    @classmethod
    @abstractmethod
    def choice(cls, batch: Mapping[str, Any]) -> "Tensor":
        """The index in `target_ids` of the teacher's most likely token, shape (N, 1)."""
