"""Rows of Parquet files, some at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmdistill.data.shard_writer import ROW_GROUP
from llmdistill.errors import InputError

TOKENS_AT_ONCE = 1 << 16  # about what a reader that decodes targets holds


def rows_at_once(file: Path) -> int:
    """Number of rows of a Parquet file that have about `TOKENS_AT_ONCE` tokens, from the mean length of its `input_ids`.

    Raises:
        InputError: it is no Parquet.
    """
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: cannot be read as Parquet: {error}") from None
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(metadata.num_columns)]
    tokens = sum(column.num_values for column in columns if column.path_in_schema.split(".")[0] == "input_ids")
    return int(np.clip(TOKENS_AT_ONCE * metadata.num_rows // max(tokens, 1), 1, ROW_GROUP))


def read_batches(files: Sequence[Path], columns: list[str] | None = None, rows: int = ROW_GROUP) -> Iterator[pa.Table]:
    """The rows of Parquet files, up to a number at a time; a part does not extend beyond the end of a file.

    Raises:
        InputError: names the file that is no Parquet, or of which a page does not match its own checksum.
    """
    for file in files:
        try:
            # Without pre_buffer=False it would hold what it has read up to the end of the file.
            with pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as parquet:
                for batch in parquet.iter_batches(batch_size=rows, columns=columns):
                    yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: cannot be read, the file was damaged or changed: {error}") from None
