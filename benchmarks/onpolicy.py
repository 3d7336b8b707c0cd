"""How far the mean gradient on the student's own text is from that of the full distributions, by what is kept of the teacher.

    python benchmarks/onpolicy.py [--student DIR] [--positions N]

The student writes at temperature 1. At each position it draws n tokens from its own distribution, of which the teacher gives its
log-probabilities; or the teacher gives its most likely tokens. What each of these makes of reverse KL and of other divergences is
compared with the full distributions: the error of the gradient with respect to the student's logits, averaged over so many
positions, relative to the size of the exact mean gradient. Errors are means over all disjoint groups of so many positions, and
over repeated draws. A noise falls with the square root of the positions, a bias stays.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
import torch
from found import argument_parser, report
from targets import TEACHER, distributions, encoded_size
from torch import Tensor

from llmdistill import losses
from llmdistill.data.targets import SampledByStudent, SampledLogprobs, SoftTargets, TopK

BLOCK = 125
SIZES = (125, 250, 500, 1000, 5000)
OTHERS = ("jsd", "skew_kl", "skew_reverse_kl", "total_variation")
Array = np.ndarray[Any, Any]
# A gradient with respect to the logits of N positions, as what is added to some of them (N, K): Σ_k a_k (e_k − q).
Sparse = tuple[Tensor, Tensor]


def main() -> None:
    """Print a table for reverse KL, one for other divergences, and the aims."""
    parser = argument_parser(__doc__)
    parser.add_argument("--positions", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=5, help="draws at each position")
    parser.add_argument("--student", help="a model directory (default: the teacher without 4 of its layers)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        teacher = synthetic.teacher(Path(directory)) if arguments.smoke else TEACHER
        if arguments.smoke:
            arguments.positions, arguments.repeats = 2 * BLOCK, 2
        measured = Measured(arguments.repeats)
        for log_p, log_q, written in distributions(
            arguments.positions, teacher, arguments.student, lambda layers: max(layers - 4, 1), dtype="float32", by_student=True
        ):
            measured.add(log_p, log_q, written)
    sizes = [size for size in SIZES if size <= arguments.positions]
    print(f"reverse KL {measured.reverse_kl:.2f} nats, {arguments.positions:,} positions\n")
    table = measured.table(sizes)
    print(f"| of reverse KL | bytes per position | {' | '.join(f'{size:,}' for size in sizes)} |")
    print(f"| --- |{' ---: |' * (1 + len(sizes))}")
    for name, row in table.items():
        if name.startswith("reverse_kl: "):
            size = f"{row['bytes']:.1f}" if "bytes" in row else ""
            print(f"| {name[12:]} | {size} | {' | '.join(f'{error:.3f}' for error in row['errors'])} |")
    print(f"\n| at {sizes[-1]:,} positions | {STUDENTS} | {TEACHERS} | {TOP} |\n| --- | ---: | ---: | ---: |")
    for loss in ("reverse_kl", *OTHERS):
        errors = [table.get(f"{loss}: {way}", {}).get("errors") for way in (STUDENTS, TEACHERS, TOP)]
        print(f"| {loss} | {' | '.join(f'{error[-1]:.3f}' if error else '' for error in errors)} |")
    ours, top = table[f"reverse_kl: {STUDENTS}"], table[f"reverse_kl: {TOP}"]
    aims = {f"own_sample_to_top_64_at_{size}": ours["errors"][i] / top["errors"][i] for i, size in enumerate(sizes)}
    aims["bytes_a_position"] = ours["bytes"]
    print()
    report({"reverse_kl": measured.reverse_kl, "sizes": sizes, "table": table}, aims, arguments.json)


STUDENTS, TEACHERS, TOP = "16 of the student's", "16 of the teacher's", "teacher's top-64 and tail"


class Measured:
    """The gradients of all ways, summed over each block of positions, less the exact ones.

    Args:
        repeats: how often a sample is drawn.
    """

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.generator = torch.Generator().manual_seed(1)
        self.missed: dict[str, list[list[Array]]] = {}  # by name, block and repetition
        self.exact: dict[str, list[Array]] = {}  # by loss and block
        self.kept: dict[str, list[SoftTargets]] = {}
        self.total = self.positions = 0.0

    @property
    def reverse_kl(self) -> float:
        """The mean over all positions."""
        return self.total / self.positions

    def add(self, log_p: Tensor, log_q: Tensor, written_N1: Tensor) -> None:
        """The positions of one text.

        Args:
            log_p: of the teacher, (N, V).
            log_q: of the student.
            written_N1: the tokens of the text.
        """
        start = int(self.positions)
        self.positions += len(log_p)
        self.total += float((log_q.exp() * (log_q - log_p)).sum())
        samples = [self._samples(log_p, log_q, n) for _ in range(self.repeats) for n in (8, 16, 32)]
        for loss in ("reverse_kl", *OTHERS):
            exact = dense(log_q, partial(losses.divergence, loss, log_p))
            for block, part in blocks(start, len(log_p)):
                self._put(self.exact.setdefault(loss, []), block, exact[part].sum(0).numpy())
            found = {TOP: [top_k(loss, log_p, log_q, log_p, 64)]}
            if loss == "reverse_kl":
                found |= self._only_of_reverse_kl(log_p, log_q, written_N1, samples)
            found[STUDENTS] = [sampled(loss, log_q, own) for own, _ in samples if own.ids_NK.shape[1] == 16]
            if SampledLogprobs.refuses(loss, 1.0) is None:
                found[TEACHERS] = [sampled(loss, log_q, its) for _, its in samples if its.ids_NK.shape[1] == 16]
            for name, gradients in found.items():
                for number, gradient in enumerate(gradients):
                    self._missed(f"{loss}: {name}", number, start, gradient, exact, log_q)

    def _samples(self, log_p: Tensor, log_q: Tensor, n: int) -> tuple[SampledByStudent, SampledLogprobs]:
        """A sample from the student and one from the teacher."""
        made = []
        for logprobs in (log_q, log_p):
            uniform = torch.rand(len(log_p), 1, generator=self.generator, dtype=torch.float64)
            ids = SampledLogprobs.keep(logprobs, n, uniform)
            made.append(SampledLogprobs.from_kept(ids.numpy(), logprobs.gather(1, ids).numpy()))
        told = log_p.gather(1, torch.from_numpy(made[0].ids_NK)).numpy()
        own = SampledByStudent.of_sample(made[0], told)
        if n == 16:
            self.kept.setdefault(STUDENTS, []).append(own)
            self.kept.setdefault(TEACHERS, []).append(made[1])
        return own, made[1]

    def _only_of_reverse_kl(
        self, log_p: Tensor, log_q: Tensor, written_N1: Tensor, samples: list[tuple[SampledByStudent, SampledLogprobs]]
    ) -> dict[str, list[Any]]:
        """Other sizes, other control variates, and what other projects keep."""
        found: dict[str, list[Any]] = {f"{n} of the student's": [] for n in (8, 32)}
        controls = {
            f"{STUDENTS}, no control variate": lambda own, log_q: torch.full((len(log_q),), -1.0),
            f"{STUDENTS}, its own estimate of the KL as control": own_estimate,
            f"{STUDENTS}, its own mean log ratio as control": own_log_ratio,
        }
        found |= {name: [] for name in controls}
        for own, _ in samples:
            n = own.ids_NK.shape[1]
            if n != 16:
                found[f"{n} of the student's"].append(sampled("reverse_kl", log_q, own))
                continue
            for name, control in controls.items():
                found[name].append(sampled("reverse_kl", log_q, own, control))
        top1 = log_p.argmax(dim=1, keepdim=True)
        both = torch.cat([top1, written_N1], dim=1)
        for name, ids in (("teacher's", log_p.topk(64).indices), ("teacher's", log_p.topk(16).indices)):
            k = ids.shape[1]
            self.kept.setdefault(f"{name} top-{k} and tail", []).append(TopK.from_kept(ids.numpy(), log_p.gather(1, ids).numpy()))
        return found | {
            "teacher's top-16 and tail": [top_k("reverse_kl", log_p, log_q, log_p, 16)],
            "student's top-16 and tail": [top_k("reverse_kl", log_p, log_q, log_q, 16)],
            "teacher's top-1, the written token and tail": [two_and_tail(log_p, log_q, both)],
            "the written token": [(written_N1, (log_q - log_p).gather(1, written_N1))],
        }

    def _missed(self, name: str, number: int, start: int, gradient: Any, exact: Tensor, log_q: Tensor) -> None:
        by_block = self.missed.setdefault(name, [])
        for block, part in blocks(start, len(exact)):
            if isinstance(gradient, tuple):
                ids, a = gradient[0][part], gradient[1][part].float()
                total = -(a.sum(1) @ log_q[part].exp())
                total.index_add_(0, ids.flatten(), a.flatten())
            else:
                total = gradient[part].sum(0)
            while len(by_block) <= block:
                by_block.append([])
            self._put(by_block[block], number, (total - exact[part].sum(0)).numpy())

    @staticmethod
    def _put(sums: list[Array], number: int, value: Array) -> None:
        if number == len(sums):
            sums.append(value.copy())
        else:
            sums[number] += value

    def table(self, sizes: list[int]) -> dict[str, Any]:
        """Of each way the errors at so many positions, and bytes a position where something is stored."""
        found: dict[str, Any] = {}
        for name, by_block in self.missed.items():
            loss, way = name.split(": ")
            errors = []
            for size in sizes:
                groups = [range(at, at + size // BLOCK) for at in range(0, len(by_block) - size // BLOCK + 1, size // BLOCK)]
                each = [
                    np.linalg.norm(sum(by_block[block][number] for block in group))
                    / np.linalg.norm(sum(self.exact[loss][block] for block in group))
                    for group in groups
                    for number in range(len(by_block[0]))
                ]
                errors.append(float(np.mean(each)))
            found[name] = {"errors": errors}
            if way in self.kept:
                kept = self.kept[way]
                found[name]["bytes"] = encoded_size(kept) / sum(map(len, kept))
        return found


def blocks(start: int, length: int) -> Iterator[tuple[int, slice]]:
    """The blocks that positions from `start` on fall into, and which of them do."""
    at = 0
    while at < length:
        end = min(length, at + BLOCK - (start + at) % BLOCK)
        yield (start + at) // BLOCK, slice(at, end)
        at = end


def dense(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of a loss (N,) with respect to the logits, (N, V)."""
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    return gradient


def top_k(loss: str, log_p: Tensor, log_q: Tensor, by: Tensor, k: int) -> Tensor:
    """The gradient on the k most likely tokens by one of the distributions and the tail."""
    ids = by.topk(k).indices
    told = log_p.gather(1, ids)
    tail = (1 - told.exp().sum(1)).clamp(min=0)
    return dense(log_q, lambda logits: losses.topk_divergence(loss, logits, ids, told, tail))


def two_and_tail(log_p: Tensor, log_q: Tensor, ids_N2: Tensor) -> Sparse:
    """The gradient of reverse KL on two tokens, which may be the same, and the tail."""
    once_N2 = torch.ones(ids_N2.shape)
    once_N2[:, 1] = (ids_N2[:, 0] != ids_N2[:, 1]).float()
    p, q = (values.gather(1, ids_N2).double().exp() * once_N2 for values in (log_p, log_q))
    rest_p, rest_q = ((1 - values.sum(1, keepdim=True)).clamp(min=1e-9) for values in (p, q))
    ratio = (log_q - log_p).gather(1, ids_N2)
    return ids_N2, q * (ratio - (rest_q / rest_p).log())


Control = Callable[[SampledByStudent, Tensor], Tensor]


def sampled(loss: str, log_q: Tensor, soft: SampledLogprobs, control: Control | None = None) -> Sparse:
    """The gradient on a sample; `control` gives another mean log ratio to make the control variate of."""
    ids = torch.from_numpy(soft.ids_NK)
    batch = {name: torch.from_numpy(np.asarray(values)) for name, values in soft.batch().items()}
    logratio = batch.get("target_logratio")
    if control is not None:
        assert isinstance(soft, SampledByStudent)
        logratio = control(soft, log_q.gather(1, ids))
    leaf = log_q.gather(1, ids).requires_grad_()
    value = losses.sampled_divergence(loss, leaf, batch["target_logprobs"], batch["target_logdesign"], logratio)
    (a,) = torch.autograd.grad(value.sum(), leaf)
    return ids, a


def own_estimate(soft: SampledByStudent, log_q: Tensor) -> Tensor:
    """The sample's own estimate of the KL."""
    logprobs, design = (torch.from_numpy(np.asarray(values)) for values in (soft.logprobs_NK, soft.logdesign_NK))
    return (log_q.exp() * design.exp() * (log_q - logprobs)).sum(1)


def own_log_ratio(soft: SampledByStudent, log_q: Tensor) -> Tensor:
    """The mean log ratio of the sample's own drawn tokens."""
    drawn = torch.from_numpy(np.arange(log_q.shape[1]) >= soft.exact_N[:, None])
    return ((log_q - torch.from_numpy(np.asarray(soft.logprobs_NK))) * drawn).sum(1) / drawn.sum(1)


if __name__ == "__main__":
    main()
