"""`llmdistill push`: upload a finished dataset or student to the Hugging Face Hub in one commit."""

import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OIDCError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from llmdistill import __version__
from llmdistill.data.dataset import shard_files
from llmdistill.data.manifest import MANIFEST
from llmdistill.data.shard_writer import SPLITS
from llmdistill.errors import InputError, RemoteError
from llmdistill.models.root_classes import FILE as CLASSES
from llmdistill.runs.files import RUN_FILE, read_json
from llmdistill.runs.progress import counted, say
from llmdistill.runs.record import read_run

Kind = Literal["dataset", "model"]
# Files of an earlier push that a loader would take for part of this one: their names change with their content or number.
_REPLACED = {
    "dataset": [*(f"{split}-*.parquet" for split in SPLITS), "rejected.parquet"],
    "model": ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter/*"],
}


def push_to_hub(directory: str | Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Upload a finished dataset or student to the Hugging Face Hub and return the URL of the commit.

    The directory is checked before the upload, shards by their checksums. The repository and the branch are created if they
    do not exist. Shards or weights of an earlier push that are not part of this one are removed in the same commit; other
    files in the repository are kept. The token is read from HF_TOKEN or `hf auth login`.

    Args:
        directory: output directory of `generate`, `score`, `curate` or `train`.
        repo_id: `user/name` or `organisation/name`; `name` alone belongs to the user of the token.
        private: create the repository as private; an error if it exists and is public.
        revision: the branch; `main` if not set.

    Raises:
        InputError: the directory is unfinished, damaged or neither a dataset nor a student, or the Hub rejects the name or
            token.
        RemoteError: the Hub cannot be reached, or fails.
    """
    kind, files = _contents(Path(directory))
    _check_repo_id(repo_id)
    return _upload(kind, files, repo_id, private, revision, _token())


def push(directory: Path, repo_id: str, private: bool, revision: str | None, dry_run: bool) -> None:
    """The command: `push_to_hub` with progress messages; a dry run checks and lists the files."""
    kind, files = _contents(directory)
    _check_repo_id(repo_id)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    what = f"{counted(len(files), 'file')}, {sum(sizes.values()):,} bytes, to the {kind} repository {repo_id}"
    if dry_run:
        for name, size in sizes.items():
            say("push", f"{size:>15,}  {name}")
        say("push", f"would upload {what}, branch {revision or constants.DEFAULT_REVISION}")
        return
    token = _token()
    say("push", what)
    if not sys.stderr.isatty():
        disable_progress_bars()
    say("push", _upload(kind, files, repo_id, private, revision, token))


def _contents(directory: Path) -> tuple[Kind, dict[str, Path]]:
    """The type of the directory, and its files by their path in the repository.

    Raises:
        InputError: it is neither a dataset nor a student, or is not finished or not whole.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    run = read_run(directory) or {}
    if run.get("status", "done") != "done":
        raise InputError(f"{directory}: not finished; run `{run['stage']}` again to continue")
    if (directory / MANIFEST).is_file():
        shards = [file for split in SPLITS for file in shard_files(directory, split)]
        others = [directory / name for name in (MANIFEST, "README.md", RUN_FILE, CLASSES)]  # what was rejected stays at home
        return "dataset", {file.name: file for file in [*shards, *others] if file.is_file()}
    if run.get("stage") in ("train", "rounds"):
        return "model", _model_files(directory)
    raise InputError(f"{directory}: neither a dataset (it has no {MANIFEST}) nor a student (it has no {RUN_FILE} of `train`)")


def _model_files(directory: Path) -> dict[str, Path]:
    index = read_json(directory / "model.safetensors.index.json")
    weights = set(index["weight_map"].values()) if index else {"model.safetensors"}
    for name in ["config.json", *sorted(weights)]:
        if not (directory / name).is_file():
            raise InputError(f"{directory / name}: the file is missing; the student is incomplete")
    found = [*directory.iterdir(), *(directory / "adapter").glob("*")]
    kept = [file for file in sorted(found) if file.is_file() and not file.name.startswith(".")]
    return {file.relative_to(directory).as_posix(): file for file in kept}


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise InputError(
            f"{repo_id}: not a valid repository name; use user/name or organisation/name "
            "in letters, digits, -, _ and ., without -- and .."
        ) from None


def _token() -> str:
    if constants.is_offline_mode():
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it (and TRANSFORMERS_OFFLINE)")
    try:
        token = get_token()
    except (OIDCError, OSError) as error:
        raise InputError(f"no token for the Hub: {' '.join(str(error).split())}") from None
    if token is None:
        raise InputError("no token for the Hub: set HF_TOKEN to a token with write access, or run `hf auth login`")
    if not (token.isascii() and token.isprintable()):  # the HTTP library would print it in its error
        raise InputError("the token for the Hub contains an invalid character; set HF_TOKEN again")
    return token


def _upload(kind: Kind, files: dict[str, Path], repo_id: str, private: bool, revision: str | None, token: str) -> str:
    api = HfApi(token=token, library_name="llmdistill", library_version=__version__)
    try:
        # None, not False: an organisation may have set that its repositories are private.
        repo_id = api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id, repo_type=kind).private:
            raise InputError(f"{repo_id}: exists and is public; choose another name, make it private, or push without --private")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
        replaced = [
            name
            for name in api.list_repo_files(repo_id, repo_type=kind, revision=revision)
            if name not in files and any(fnmatch(name, pattern) for pattern in _REPLACED[kind])
        ]
        # Not upload_folder, which may make several commits: a reader would see half a dataset between them.
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in replaced),
                *(CommitOperationAdd(name, file) for name, file in files.items()),
            ],
            commit_message=f"Push the {kind} with llmdistill {__version__}",
            repo_type=kind,
            revision=revision,
        )
    except InputError:
        raise
    except Exception as error:  # HTTP, Xet and the threads of an upload each raise their own, with no common base
        raise _explained(error, repo_id, token) from error
    return commit.commit_url


def _explained(error: Exception, repo_id: str, token: str) -> InputError | RemoteError:
    """The error in one line without the token; a refusal by the Hub is wrong input, anything else is not."""
    status, said = 0, ""
    for cause in [error] if isinstance(error, HfHubHTTPError) else [error, error.__cause__]:
        text = str(cause or "")
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            text = cause.server_message or f"status {status}"  # its own text has the URL, which may be a signed one
        said += f" {text}" if text not in said else ""
    said = " ".join(said.replace(token, "…").split()) or type(error).__name__
    if status == 401:
        return InputError(f"{repo_id}: the Hub rejects the token (HF_TOKEN, or that of `hf auth login`): {said}")
    if 400 <= status < 500 and status not in (408, 409, 412, 429):
        return InputError(f"{repo_id}: the Hub refuses: {said}")
    return RemoteError(f"{repo_id}: the push failed; try again, which does not resend files already uploaded: {said}")
