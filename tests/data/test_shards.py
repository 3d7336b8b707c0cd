"""Several workers on one dataset, and what happens to a shard that is damaged or missing."""

import pytest

from llmdistill import load_dataset
from llmdistill.config import load_experiment
from llmdistill.data.dataset import finished_shards
from llmdistill.data.shards import Share
from llmdistill.errors import InputError
from llmdistill.stages.generate import generate


def files(directory):
    return {file.name: file.read_bytes() for file in directory.glob("train-*")}


@pytest.fixture
def experiment(experiment_file):
    return load_experiment(experiment_file)


@pytest.fixture
def undisturbed(experiment_file):
    experiment = load_experiment(experiment_file, [("output", f"{experiment_file.parent}/undisturbed")])
    generate(experiment)
    return files(experiment.directory("data"))


def test_workers_make_together_what_one_makes_alone(experiment, undisturbed, capsys):
    directory = experiment.directory("data")
    for number in (2, 0):
        generate(experiment, worker=Share(number, 3))
        with pytest.raises(InputError, match="not finished"):
            load_dataset(directory)
    assert "3 of 4 shards there" in capsys.readouterr().out
    generate(experiment, worker=Share(1, 3))
    assert files(directory) == undisturbed
    assert len(load_dataset(directory)) == 24


def test_a_worker_with_nothing_to_do_says_so(experiment, capsys):
    generate(experiment, worker=Share(4, 5))
    assert "0 of 4 shards there" in capsys.readouterr().out


def test_a_damaged_shard_is_named_and_made_again_when_work_goes_on(experiment, undisturbed, capsys):
    directory = experiment.directory("data")
    generate(experiment, worker=Share(0, 2))
    file = finished_shards(directory, "train")[1].file
    file.write_bytes(file.read_bytes()[:-7])
    generate(experiment)
    assert f"{file} is damaged; it is made again" in capsys.readouterr().out.replace("\n", "")
    assert files(directory) == undisturbed


def test_a_shard_that_went_missing_after_the_end_is_made_again(experiment, undisturbed):
    directory = experiment.directory("data")
    generate(experiment)
    finished_shards(directory, "train")[2].file.unlink()
    with pytest.raises(InputError, match="the shard is missing"):
        load_dataset(directory)
    generate(experiment)
    assert files(directory) == undisturbed
    assert len(load_dataset(directory)) == 24


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2"])
def test_a_share_that_is_none(text):
    with pytest.raises(InputError, match="must be like 2/8"):
        Share.parse(text)
