"""How students train in rounds, by the configurations that the rounds make."""

from pathlib import Path

import pytest

from llmdistill.config import Experiment
from llmdistill.config.train import Mix
from llmdistill.runs import record
from llmdistill.stages.rounds import _MicroRounds
from llmdistill.students.on_policy import round_of, round_training
from llmdistill.students.sides import training_dataset


def experiment(rounds, **sections):
    tree = {
        "output": "run",
        "teacher": {"model": "t", "engine": "transformers"},
        "prompts": {"source": "p.jsonl"},
        "targets": {"kind": "sampled"},
        "student": {"model": "t"},
    }
    return Experiment.model_validate({**tree, "rounds": rounds, **sections})


def test_a_round_trains_on_its_own_text_whatever_the_first_training_read():
    made = round_of(experiment({"n": 1}, train={"dataset": "elsewhere"}), "1", 1, "run/student")
    assert made.curated.dataset_directory == made.whole.dataset_directory == Path("run/rounds/1/curated")
    assert made.written.prompts.source == "elsewhere"
    shared = round_training(experiment({"n": 1, "teacher_share": 0.25}, train={"dataset": "elsewhere"}))
    assert shared.mix == Mix(datasets=["elsewhere"], share=0.25)


@pytest.mark.parametrize("train", [{}, {"alpha": 0.5}, {"alpha": 0}, {"alpha": 0.2, "alpha_end": 0.6}])
def test_a_round_has_no_cross_entropy_on_the_students_own_text(train):
    found = round_training(experiment({"n": 1, "loss": "reverse_kl"}, train=train))
    assert (found.loss, found.alpha, found.alpha_end) == ("reverse_kl", 1, None)
    with_sequences = round_training(experiment({"n": 1}, train={"alpha": 0.5, "sequence_alpha": 0.2}))
    assert (with_sequences.alpha, with_sequences.sequence_alpha) == (0.8, 0.2)


def test_a_number_of_epochs_in_the_rounds_takes_the_place_of_steps():
    steps = {"args": {"max_steps": 3, "learning_rate": 1e-4}}
    assert round_training(experiment({"n": 1, "args": {"num_train_epochs": 2}}, train=steps)).args == {
        "learning_rate": 1e-4,
        "num_train_epochs": 2,
    }
    assert round_training(experiment({"n": 1, "args": {"learning_rate": 1e-5}}, train=steps)).args["max_steps"] == 3


def test_what_would_be_left_out_in_silence_is_refused():
    mix = {"mix": {"datasets": ["more"], "share": 0.3}}
    with pytest.raises(ValueError, match=r"rounds.teacher_share and train.mix both set what is mixed"):
        experiment({"n": 1, "teacher_share": 0.25}, train=mix)
    assert round_training(experiment({"n": 1}, train=mix)).mix.datasets == ["more"]
    with pytest.raises(ValueError, match=r"train.position_weights is entropy, but rounds with loss reverse_kl"):
        experiment({"n": 1, "loss": "reverse_kl"}, train={"position_weights": "entropy"})
    assert round_training(experiment({"n": 1}, train={"position_weights": "entropy"})).position_weights == "entropy"


def test_custom_code_of_the_student_may_run_where_it_writes():
    trusted = experiment({"n": 1}, student={"model": "s", "trust_remote_code": True})
    assert round_of(trusted, "1", 1, "run/student").written.teacher.trust_remote_code
    assert not round_of(experiment({"n": 1}), "1", 1, "run/student").written.teacher.trust_remote_code


def test_micro_rounds_keep_a_checkpoint_of_every_round_whatever_the_first_training_kept():
    def arguments(rounds):
        settings = experiment({"n": 5, "every": 16, **rounds}, train={"args": {"save_steps": 100, "save_total_limit": 1}})
        claim = record.Claim(settings.directory("student"), "rounds", {}, {})
        return _MicroRounds(settings, claim).learner.train.args

    assert {name: arguments({})[name] for name in ("save_steps", "save_total_limit")} == {"save_steps": 16, "save_total_limit": 2}
    assert arguments({"args": {"save_steps": 48}})["save_steps"] == 48


def test_the_text_of_the_teacher_is_that_of_the_first_training():
    assert training_dataset(experiment({"n": 1}, train={"dataset": "elsewhere"})) == Path("elsewhere")
