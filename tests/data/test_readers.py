"""Shards are plain Parquet: what pandas, Polars, DuckDB and Spark read of them is what was written."""

import os
import shutil

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch

from llmdistill.data.rows import Row, rows_to_table
from llmdistill.data.shard_writer import write_shard
from llmdistill.data.targets import KINDS, SampledLogprobs

WITH_TARGETS = [name for name, kind in KINDS.items() if kind.size]


@pytest.fixture(scope="module", params=WITH_TARGETS)
def shard(request, tmp_path_factory):
    kind, generator, rows = KINDS[request.param], np.random.default_rng(0), []
    for number in range(5):
        logprobs = torch.from_numpy(generator.normal(size=(4 + number, 1000)) * 2).log_softmax(-1)
        drawn = SampledLogprobs if kind.of_writer else kind  # what the student draws, the teacher tells
        ids = drawn.keep(logprobs, 12, torch.from_numpy(generator.random((len(logprobs), drawn.uniforms(12)))))
        soft = drawn.from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
        if kind.of_writer:
            soft = kind.of_sample(soft, logprobs.gather(1, ids).numpy() - 0.5)
        message = [{"role": "user", "content": f"q{number}"}]
        written = np.arange(len(logprobs))
        row = Row(str(number), message, message, [1, 2, 3], written, "stop", np.full(len(written), -0.5), soft, -1.0)
        rows.append(row)
    file = write_shard(tmp_path_factory.mktemp("shard"), "train", 0, 1, rows_to_table(rows, 49152)).file
    return file, pq.read_table(file).to_pydict()


def plain(value):
    """Lists and numbers of Python, whatever the library gives."""
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(other) for other in value]
    return {name: plain(other) for name, other in value.items()} if isinstance(value, dict) else value


def test_pandas(shard):
    file, want = shard
    assert {name: plain(list(column)) for name, column in pandas.read_parquet(file).items()} == want


def test_polars(shard):
    polars = pytest.importorskip("polars", reason="Polars is not installed; see .readers in the Makefile")
    file, want = shard
    assert polars.read_parquet(file).to_dict(as_series=False) == want


def test_duckdb(shard):
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is not installed; see .readers in the Makefile")
    file, want = shard
    for name, column in want.items():
        assert [plain(value) for (value,) in duckdb.sql(f"select {name} from '{file}'").fetchall()] == column


def test_spark(shard):
    """Not in .readers, being half a gigabyte: with `pyspark` and a Java at hand it is run."""
    pytest.importorskip("pyspark", reason="Spark is not installed")
    if shutil.which("java") is None and not os.environ.get("JAVA_HOME"):
        pytest.skip("there is no Java")
    from pyspark.sql import SparkSession

    file, want = shard
    session = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    rows = [row.asDict(recursive=True) for row in session.read.parquet(str(file)).collect()]
    assert {name: [row[name] for row in rows] for name in want} == want
