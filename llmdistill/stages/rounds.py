"""`llmdistill rounds`: micro-rounds, a training on rows that the student generates and the teacher scores every few steps."""

import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from llmdistill.config import Experiment
from llmdistill.config.machine import Precision
from llmdistill.data.dataset import load_dataset
from llmdistill.data.ids import stable_id
from llmdistill.data.manifest import MANIFEST, read_manifest
from llmdistill.errors import InputError
from llmdistill.runs import record
from llmdistill.runs.inputs import model_fingerprint, sha256
from llmdistill.runs.progress import counted, say
from llmdistill.stages import curate, generate, score, train
from llmdistill.stages.prompts import Prepared, PromptTable, prepared_prompts
from llmdistill.students.on_policy import Round, round_of, round_training
from llmdistill.teachers.resident import Resident
from llmdistill.training.rows import check_mix, learnable, mixed_rows
from llmdistill.training.settings import arguments_of

# After a stop the steps since the last checkpoint are trained again, on the rows that are there. So one is written after every
# round, and few are kept, unless `rounds.args` says otherwise.
_KEPT_CHECKPOINTS = 2


def rounds(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/rounds/student` and the rows of every round, `OUTPUT/rounds/step-N`, continuing an interrupted run.

    Raises:
        InputError: the first student, the dataset, the teacher or the output directory are not usable; nothing was written.
    """
    settings = experiment.rounds
    if settings is None or settings.every is None:
        raise InputError("the key rounds.every is missing; `rounds` makes micro-rounds, `run` whole rounds of other stages")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("rounds.every: micro-rounds run in one process on one device; start without torchrun")
    directory, first = experiment.directory("student"), experiment.first_student
    plan = f"{counted(settings.n, 'round')} of {counted(settings.every, 'step')}; would write {directory}"
    if dry_run and not (first / "config.json").is_file():
        return say("rounds", plan)
    claim = _claim(experiment)
    state = record.claim(*claim)
    if dry_run:
        say("rounds", plan)
    elif state == "done":
        say("rounds", f"{directory} is finished")
    else:
        _MicroRounds(experiment, claim).train()
    return None


def claims(experiment: Experiment) -> list[record.Claim]:
    """The student, the existing rows of the rounds, and what they depend on."""
    claim = _claim(experiment)
    return [claim, *_MicroRounds(experiment, claim).there()]


def _claim(experiment: Experiment) -> record.Claim:
    """The student's directory."""
    first, curated = experiment.first_student, experiment.dataset_directory / MANIFEST
    if not (first / "config.json").is_file():
        raise InputError(f"{first}: does not exist; run `train` first, or `run` for all stages")
    names = {"seed", "teacher", "generate", "targets", "curate", "student", "rounds"}
    settings = experiment.model_dump(mode="json", include=names)
    settings["train"] = round_training(experiment).model_dump(mode="json")
    mixed = {str(path / MANIFEST): sha256(path / MANIFEST) for path in experiment.mixed_datasets}
    inputs = {str(first): model_fingerprint(str(first), None), str(curated): sha256(curated), **mixed}
    inputs[experiment.teacher.model] = model_fingerprint(experiment.teacher.model, experiment.teacher.revision)
    return record.Claim(experiment.directory("student"), "rounds", settings, inputs)


class _MicroRounds:
    """The rounds of an experiment.

    Args:
        experiment: the run's.
        claim: of the student's directory.
    """

    def __init__(self, experiment: Experiment, claim: record.Claim) -> None:
        assert experiment.rounds is not None
        assert experiment.rounds.every is not None
        self.experiment, self.claim, self.settings, self.every = experiment, claim, experiment.rounds, experiment.rounds.every
        training = round_training(experiment)
        kept = {"save_strategy": "steps", "save_steps": self.every, "save_total_limit": _KEPT_CHECKPOINTS}
        set_here = {"num_train_epochs": self.settings.n, "max_steps": -1}
        first = round_of(experiment, "step-0", 1, str(experiment.first_student)).curated.directory("curated")
        self.learner = experiment.with_(
            rounds=None,
            targets=experiment.own_targets,
            student=experiment.student.continued(str(experiment.first_student)),
            train=training.with_(args=experiment.train.args | kept | self.settings.args | set_here, dataset=str(first)),
        )

    def train(self) -> None:
        """Make the first round, with the student before training as the writer, and train; the others are made meanwhile."""
        self.arguments  # noqa: B018 - what is wrong with them is said before anything is written
        if record.read_run(self.claim.directory) is None:
            record.begin(*self.claim, self.experiment.seed)
        try:
            self._make(0)
            manifest = read_manifest(self._of(0).curated.directory("curated"))
            mixed = [read_manifest(directory, "train.mix.datasets") for directory in self.learner.mixed_datasets]
            check_mix(self.learner, manifest, mixed)
            train.train_one(self.learner, manifest, self.claim, self._feed)
        finally:
            self.writer.close()
            self.reader.close()

    def there(self) -> Iterator[record.Claim]:
        """The datasets of all rounds started so far."""
        for number in range(self.settings.n):
            made = self._of(number)
            if not made.written.directory("data").is_dir():
                return
            yield from self._claims(number)
            if not (made.curated.directory("curated") / MANIFEST).is_file():
                return

    def _feed(self, trainer: Any) -> None:
        from llmdistill.training.rounds import train_in_rounds

        train_in_rounds(trainer, self.every, self._rows)

    def _rows(self, number: int, student: Any) -> Any:
        """The rows of a round, from 0, including those of the teacher's text."""
        self.writer.student = student
        self._make(number)
        rows = load_dataset(self._of(number).curated.directory("curated"), "train")
        seed = self._of(number).whole.seed
        return learnable(mixed_rows(self.learner.with_(seed=seed), rows), self.arguments)

    def _make(self, number: int) -> None:
        """Let the student generate, the teacher score, and the steps of `curate` select, as far as not done before."""
        if all(record.claim(*claim) == "done" for claim in self._claims(number)):
            return
        made = self._of(number)
        say("rounds", f"{number + 1:,} of {self.settings.n:,}: the student writes after {counted(number * self.every, 'step')}")
        datasets = made.written.directory("data"), made.scored.directory("data"), made.curated.directory("curated")
        with record.nothing_begun(datasets):
            generate.generate(made.written, writer=self._writer(number))
            self.writer.rest()
            score.score(made.scored, opened=self.reader.open)
            self.reader.rest()
            curate.curate(made.curated)

    def _claims(self, number: int) -> Iterator[record.Claim]:
        """What the datasets of a round depend on, each known only once the previous one exists."""
        made = self._of(number)
        yield from generate.claims(made.written, self._writer(number))
        if (made.written.directory("data") / MANIFEST).is_file():
            yield from score.claims(made.scored)
        if (made.scored.directory("data") / MANIFEST).is_file():
            yield from curate.claims(made.curated)

    def _of(self, number: int) -> Round:
        """The experiments of a round, from 0."""
        made = round_of(self.experiment, f"step-{number * self.every}", number + 1, str(self.experiment.first_student))
        teacher = made.written.teacher
        if teacher.engine == "transformers":  # the model in training is computed in what it is trained in
            teacher = teacher.with_(dtype=self.precision.dtype)
        if "gpu_memory_utilization" in self.experiment.teacher.engine_args:  # of the device that both take in turns
            share = self.experiment.teacher.engine_args["gpu_memory_utilization"]
            teacher = teacher.with_(engine_args={"gpu_memory_utilization": share})
        return Round(made.written.with_(teacher=teacher), made.scored, made.curated, made.whole)

    def _writer(self, number: int) -> generate.Writer:
        """The student of a round: determined by the first one, its training, and the rows of the previous round."""
        first, teacher = str(self.experiment.first_student), self.experiment.teacher.model
        made_from = {first: self.claim.inputs[first]}
        fingerprint = made_from[first]
        if number:
            before = self._of(number - 1).curated.directory("curated")
            settings = record.lasting(self.claim.settings)
            # No paths: a row has the same id on any machine.
            how = {name: value for name, value in settings["train"].items() if name not in ("dataset", "mix")}
            made_from[str(self.claim.directory)] = stable_id({**settings, "train": how})
            made_from[str(before / MANIFEST)] = sha256(before / MANIFEST)
            ids = load_dataset(before, "train")["id"]
            fingerprint = stable_id(fingerprint, self.claim.inputs[teacher], how, number, list(ids))
        seed = self._of(number).whole.seed
        return generate.Writer(
            lambda spec: self.writer.open(spec), fingerprint, made_from, self._prompts, lambda: self._drawn(seed)
        )

    @cached_property
    def arguments(self) -> Any:
        """The `DistillConfig` of the training."""
        return arguments_of(self.learner, self.claim.directory, False, self.precision, key="rounds.args")

    @cached_property
    def precision(self) -> Precision:
        """The precision of the student's training."""
        return train.settled(self.learner, self.claim)

    @cached_property
    def _prompts(self) -> int:
        """Number of prompts answered per round."""
        from llmdistill.training.rounds import round_places

        if self.settings.limit:
            return self.settings.limit
        mix, places = self.learner.train.mix, round_places(self.arguments, self.every)
        return max(places - round(places * mix.share), 1) if mix else places

    def _drawn(self, seed: int) -> Prepared:
        """The prompts of a round, in the order of the dataset."""
        prepared = self._prepared
        order = np.random.default_rng(seed).permutation(len(prepared.prompts))
        chosen = np.sort(order[: self._prompts]).tolist()
        return Prepared(PromptTable(prepared.prompts[number] for number in chosen), prepared.inputs, prepared.steps)

    @cached_property
    def _prepared(self) -> Prepared:
        prepared = prepared_prompts(self._of(0).written)
        assert prepared is not None
        return prepared

    @cached_property
    def writer(self) -> Resident:
        """The student's engine."""
        return Resident("student", self._longest)

    @cached_property
    def reader(self) -> Resident:
        """The teacher's."""
        return Resident("teacher", self.experiment.teacher.max_model_len or self._longest + 1)

    @cached_property
    def _longest(self) -> int:
        """Length in tokens of the longest prompt with its answer."""
        rows = load_dataset(self.experiment.dataset_directory, "train").select_columns(["completion_start"])
        return int(rows.with_format("arrow")[:]["completion_start"].to_numpy().max()) + self.experiment.generate.max_tokens
