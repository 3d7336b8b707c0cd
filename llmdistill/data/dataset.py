"""A dataset: a directory of Parquet shards and one `dataset.json`. The format is described in docs/dataset.md."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmdistill.data import targets
from llmdistill.data.manifest import read_manifest
from llmdistill.data.row_checks import check_rows
from llmdistill.data.shard_writer import Split, is_damaged
from llmdistill.errors import InputError

if TYPE_CHECKING:
    import datasets


def shard_files(directory: Path, split: Split) -> list[Path]:
    """The shards of one split, checked against the checksums in their names, and their rows for consistency.

    Raises:
        InputError: names the file whose bytes are not what they were, or whose rows no teacher can have written.
    """
    manifest = read_manifest(directory)
    several = manifest.get("teachers", {})
    by_teacher = {name: one["tokenizer"]["vocab_size"] for name, one in several.items() if "tokenizer" in one}
    sizes, their_sizes = {"": manifest["tokenizer"]["vocab_size"]}, None
    if "alignment" in manifest:
        their_sizes = by_teacher or {"": manifest["teacher_tokenizer"]["vocab_size"]}
    elif by_teacher:
        sizes = by_teacher
    files = [directory / entry["file"] for entry in manifest["shards"] if entry["split"] == split]
    for file in files:
        if is_damaged(file):
            raise InputError(
                f"{file}: the checksum does not match; the file was damaged or changed. Delete it and generate it again"
            )
        check_rows(file, sizes, targets.KINDS[manifest["targets"]["kind"]], their_sizes)
    return files


def load_dataset(directory: str | Path, split: Split = "train") -> "datasets.Dataset":
    """Load one split as a `datasets.Dataset` whose rows are dictionaries of numpy arrays. Shards are memory-mapped.

    Raises:
        InputError: the directory has no complete dataset of this schema version, or a shard is damaged.
    """
    import datasets

    directory = Path(directory)
    files = shard_files(directory, split)
    if not files:
        raise InputError(f"{directory}: has no rows in the split {split}")
    datasets.utils.logging.disable_progress_bar()
    dataset = datasets.Dataset.from_parquet([str(file) for file in files])
    return dataset.with_format("numpy")
