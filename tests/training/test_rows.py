"""The rows that a student is trained on."""

import shutil

import pytest

from llmdistill.config import load_experiment
from llmdistill.data.dataset import load_dataset
from llmdistill.data.subjects import conversation_keys
from llmdistill.stages.curate import curate
from llmdistill.stages.generate import generate
from llmdistill.training.rows import mixed_rows

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]


def test_no_prompt_that_a_mixed_dataset_holds_out_is_trained_on(experiment_file, tmp_path, capsys):
    """The same prompts, split by another seed: what either holds out is in the rows of neither."""
    experiment = load_experiment(experiment_file, [("eval.held_out", "0.4")])
    generate(experiment)
    curate(experiment)
    other = experiment.with_(output=str(tmp_path / "other"), seed=1)
    shutil.copytree(experiment.directory("data"), other.directory("data"))
    curate(other)
    mixed = experiment.with_(train=experiment.train.with_(mix={"datasets": [str(other.directory("curated"))], "share": 0.5}))

    def prompts_of(rows):
        return set(conversation_keys(rows.select_columns(["prompt", "completion", "metadata"]).with_format("arrow")[:]))

    ours, theirs = (prompts_of(load_dataset(one.directory("curated"), "test")) for one in (experiment, other))
    rows = load_dataset(experiment.directory("curated"), "train")
    assert prompts_of(rows) & theirs, "there is something to leave out"
    found = prompts_of(mixed_rows(mixed, rows))
    assert found
    assert not found & (ours | theirs)
    assert capsys.readouterr().out.count("whose prompts another dataset holds out") == 2
