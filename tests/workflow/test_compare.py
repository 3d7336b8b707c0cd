"""Several runs on one page."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmdistill.errors import InputError
from llmdistill.evaluation.statistics import two_sided_p
from llmdistill.workflow.compare import compare
from tests.conftest import run_cli
from tests.stages.test_report import Page, metrics, write


def make_run(directory, worse=0.0, rows=80, shift=0, alpha=0.9):
    """A run whose student is so much worse in KL, on rows that begin at number `shift`."""
    generator = np.random.default_rng(5)
    tokens = generator.integers(20, 90, rows)
    kl = tokens * (1 + worse + generator.normal(size=rows) * 0.1 + np.random.default_rng(shift).normal(size=rows) * worse / 4)
    table = {"id": [f"row{n + shift}" for n in range(rows)], "conversation": [f"c{n // 2}" for n in range(rows)]}
    table |= {"tokens": tokens, "student kl": kl, "student top1": tokens * 0.5, "student nll": kl + tokens}
    (directory / "eval").mkdir(parents=True)
    pq.write_table(pa.table(table).take(generator.permutation(rows)), directory / "eval/rows.parquet")
    write(directory / "eval/metrics.json", metrics())
    write(
        directory / "student/run.json",
        {"stage": "train", "status": "done", "settings": {"train": {"alpha": alpha, "args": {"x": "<b>"}}, "seed": 0}},
    )
    return directory


def test_the_better_run_is_named_with_its_paired_interval(tmp_path, capsys):
    """A shift that is small beside the spread of the rows shows, because the rows are the same."""
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", 0.02, alpha=0.5), make_run(tmp_path / "c", -0.5)]
    compare(runs, tmp_path / "page.html")
    verdict = "c is closer to the teacher than a; b is farther from the teacher than a."
    assert verdict in capsys.readouterr().out.replace("\n", " ")
    page = Page((tmp_path / "page.html").read_text())
    shown = " ".join(page.text.split())
    assert verdict in shown
    assert "train.alpha0.90.50.9" in shown
    assert "train.args.x" not in shown
    text = (tmp_path / "page.md").read_text()
    assert "| b | 2.13 (2.08–2.18) | 0.021 (0.019–0.022) | 0.002 |" in text
    assert "| train.alpha | 0.9 | 0.5 | 0.9 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in rows} == {10, 5}


def test_equal_runs_are_not_shown_to_differ(tmp_path, capsys):
    compare([make_run(tmp_path / "x/run"), make_run(tmp_path / "y/run")], tmp_path / "page.html")
    assert "y/run is not shown to differ from x/run." in capsys.readouterr().out
    assert "Their configurations are the same." in (tmp_path / "page.md").read_text()


def test_rounds_and_keys_beyond_the_first_are_told(tmp_path):
    """What the measured student was trained with, which of rounds is the last one's; and that keys are left out."""
    one, two = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for number in (1, 2):
        told = {"stage": "train", "status": "done", "settings": {"train": {"loss": "reverse_kl", "alpha": 0.9}, "seed": 0}}
        write(two / f"rounds/{number}/student/run.json", told)
    evaluated = metrics()
    next(model for model in evaluated["models"] if model["name"] == "student")["path"] = str(two / "rounds/2/student")
    write(two / "eval/metrics.json", evaluated)
    compare([one, two], tmp_path / "page.html")
    text = (tmp_path / "page.md").read_text()
    assert "| rounds | – | 2 |" in text
    assert r"| train.loss | – | reverse\_kl |" in text
    many = {"stage": "eval", "status": "done", "settings": {f"k{n:02}": n for n in range(30)}}
    write(two / "eval/run.json", many)
    compare([one, two], tmp_path / "page.html")
    assert "| and 21 more |" in (tmp_path / "page.md").read_text()


def test_a_student_that_was_measured_over_other_positions_is_refused(tmp_path):
    """After `retokenize` the rows have the same ids and fewer positions, over classes."""
    one, two = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    table = pq.read_table(two / "eval/rows.parquet")
    fewer = pa.array([tokens - tokens // 3 for tokens in table["tokens"].to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index("tokens"), "tokens", fewer), two / "eval/rows.parquet")
    with pytest.raises(
        InputError, match=r"b: its held-out rows have different positions than in .*a; students with different vocabularies"
    ):
        compare([one, two], tmp_path / "page.html")


def test_a_comparison_is_written_where_it_can_be_and_over_nothing_else(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    with pytest.raises(InputError, match=r"no such directory .*nowhere"):
        compare(runs, tmp_path / "nowhere/page.html")
    (tmp_path / "README.md").write_text("precious")
    with pytest.raises(InputError, match=r"README.md, which would be written next to it, already exists"):
        compare(runs, tmp_path / "README.html")
    compare(runs, tmp_path / "page.html", dry_run=True)
    assert "would write" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "a", "b"]
    assert (tmp_path / "README.md").read_text() == "precious"


def test_bad_input_is_named(tmp_path):
    run = make_run(tmp_path / "a")
    with pytest.raises(InputError, match="a comparison needs at least two directories"):
        compare([run], tmp_path / "page.html")
    with pytest.raises(InputError, match="a run is named twice"):
        compare([run, tmp_path / "a"], tmp_path / "page.html")
    with pytest.raises(InputError, match=r"its held-out rows differ from those of .*/a: 73 of 80 and 80 are the same"):
        compare([run, make_run(tmp_path / "b", shift=7)], tmp_path / "page.html")
    with pytest.raises(InputError, match=r"page.pdf: must end in .html"):
        compare([run, run], tmp_path / "page.pdf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty/eval/metrics.json is missing"):
        compare([run, tmp_path / "empty"], tmp_path / "page.html")
    assert not list(tmp_path.glob("page*"))


def test_p_of_a_difference_far_from_zero_is_small_and_of_none_is_large():
    generator = np.random.default_rng(0)
    assert two_sided_p(generator.normal(size=999)) > 0.8
    assert two_sided_p(generator.normal(size=999) + 9) == 2 / 1000
    assert two_sided_p(generator.normal(size=100_000) - 1.96) == pytest.approx(0.05, abs=0.003)


def test_the_command_takes_directories(tmp_path):
    make_run(tmp_path / "a"), make_run(tmp_path / "b", 0.1)
    done = run_cli("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "both.html").is_file()
    wrong = run_cli("report", tmp_path / "a", tmp_path / "nothing")
    message = f"{tmp_path}/nothing: no such directory; to compare runs, give the `output` directory of each\n"
    assert (wrong.returncode, wrong.stderr) == (2, message)
    assert json.loads((tmp_path / "a/eval/metrics.json").read_text())
