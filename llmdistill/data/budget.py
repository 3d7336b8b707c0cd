"""The cost of a dataset at an endpoint: before, during and after it is made."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmdistill.config import Experiment
from llmdistill.data.shard_writer import Shard, billed, finished_shards
from llmdistill.errors import BudgetError, InputError
from llmdistill.teachers import Completion, Request, Usage, longest_answer, most_billed, shared_file
from llmdistill.teachers.limits import spent

CHARACTERS = 4  # per token, if nothing is encoded yet


class Budget:
    """Lets shards start while their maximum cost fits the budget; without a budget, all of them.

    What counts as spent is what was paid for all answers, stored or not, of all workers, and the most that this worker's
    unfinished shards may still cost. Each further worker may go beyond the budget by what its own unfinished shards cost.

    Args:
        experiment: with the price and the budget.
        directory: of the dataset.
        requests_of: the requests of a shard by its number.
        reads: whether what is written is read again.
    """

    def __init__(
        self, experiment: Experiment, directory: Path, requests_of: Callable[[int], Sequence[Request]], reads: bool
    ) -> None:
        self.experiment, self.directory, self.requests_of, self.reads = experiment, directory, requests_of, reads
        self.held: int | None = None
        self._running: dict[int, float] = {}
        self._costs: dict[Path, float] = {}

    def most(self, index: int) -> float:
        """Maximum cost of a shard, as its prompts are encoded here."""
        teacher, usage = self.experiment.teacher, Usage()
        for request in self.requests_of(index):
            most = most_billed(request, teacher, self.experiment.generate)
            usage += most
            if self.reads and not request.completion_ids:
                usage += Usage(most.input + most.output, 1)
        return usage.cost(teacher.price, teacher.batch) or 0.0

    def spent(self) -> float:
        """Amount paid so far."""
        stored = sum(map(self._cost, finished_shards(self.directory, "train")))
        return max(stored, spent(shared_file(self.directory)))

    def _cost(self, shard: Shard) -> float:
        """The cost of a finished shard, read once; 0 for a damaged one, which will be made again."""
        if shard.file not in self._costs:
            try:
                self._costs[shard.file] = sum(entry.get("cost") or 0.0 for entry in billed([shard]))
            except (pa.ArrowException, OSError):
                return 0.0
        return self._costs[shard.file]

    def within(self, missing: Iterator[int]) -> Iterator[int]:
        """The shards that may start; the first that may not is `held` until others have finished."""
        while (index := next(missing, None) if self.held is None else self.held) is not None:
            self.held = None if self.fits(index) else index
            if self.held is not None:
                return
            self._running[index] = self.most(index) if self.experiment.teacher.budget else 0.0
            yield index

    def fits(self, index: int) -> bool:
        """Whether a shard may start now."""
        budget = self.experiment.teacher.budget
        return budget is None or self.spent() + sum(self._running.values()) + self.most(index) <= budget

    def finished(self, index: int) -> None:
        """Record that a shard is stored and its cost is known."""
        self._running.pop(index, None)

    def check(self, index: int) -> None:
        """Refuse to start if the first shard may cost too much.

        Raises:
            InputError: even the first of a dataset may.
            BudgetError: what is left of the budget is too little.
        """
        if self.fits(index):
            return
        teacher, paid, most = self.experiment.teacher, self.spent(), self.most(index)
        if not paid:
            raise InputError(
                f"teacher.budget is {teacher.budget:g}, and one shard of {len(self.requests_of(index)):,} rows may cost up to "
                f"{money(most)}; raise it, or lower generate.rows_per_shard or generate.max_tokens"
            )
        raise BudgetError(
            f"teacher.budget {teacher.budget:g} is spent: {money(paid)} was paid, and the next shard may cost up to "
            f"{money(most)}; all finished shards are kept; raise teacher.budget and run the same command to continue"
        )


def bill(completions: Sequence[Completion], experiment: Experiment, gives: dict[str, Any] | None) -> dict[str, Any]:
    """The entry of a shard about its cost; empty if the teacher is not billed.

    Args:
        completions: all of the shard, those that failed included.
        experiment: with the price.
        gives: what the endpoint gives.
    """
    if gives is None:
        return {}
    teacher = experiment.teacher
    usage = sum((completion.usage for completion in completions if completion.usage), Usage())
    return {**asdict(usage), "cost": usage.cost(teacher.price, teacher.batch), "gives": gives}


def whole_bill(directory: Path, shards: Sequence[Shard], experiment: Experiment) -> dict[str, Any]:
    """Entries in `dataset.json`: the `cost` of the whole dataset, and what the endpoint `gives`, a list if that has changed."""
    bills = billed(shards)
    if not bills:
        return {}
    price = experiment.teacher.price
    usage = {f"{name}_tokens": sum(entry[name] for entry in bills) for name in ("input", "cached", "output")}
    gives = list({json.dumps(entry["gives"], sort_keys=True): entry["gives"] for entry in bills}.values())
    cost: dict[str, Any] = {**usage}
    if price is not None:
        total = sum(entry["cost"] or 0.0 for entry in bills)
        cost |= {"total": total, "paid": max(total, spent(shared_file(directory))), "price": price.model_dump()}
    return {"cost": cost, "gives": gives[0] if len(gives) == 1 else gives}


def estimate(experiment: Experiment, characters: int, rows: int) -> str | None:
    """The approximate maximum cost of a dataset, in words; None without a price.

    Args:
        experiment: with the price.
        characters: of all prompts together, each as often as it is answered.
        rows: how many answers there will be.
    """
    teacher = experiment.teacher
    usage = Usage(characters // CHARACTERS, rows * longest_answer(teacher, experiment.generate))
    cost = usage.cost(teacher.price, teacher.batch)
    if cost is None:
        return None
    left = f", the budget is {teacher.budget:g}" if teacher.budget else ""
    if teacher.budget and cost > teacher.budget:
        left += ", which may not be enough"
    return f"at most about {money(cost)} for {usage.input:,} tokens in and {usage.output:,} out{left}"


def money(amount: float) -> str:
    """Format with two decimals, or enough for the first two non-zero digits."""
    return f"{amount:,.2f}" if amount >= 1 or not amount else f"{amount:.2g}" if amount >= 1e-4 else f"{amount:.1e}"
