"""The training rows of a student that learns only from a task's examples, as a baseline for distillation."""

from typing import Any

from llmdistill.config.shipped import find
from llmdistill.config.train import Examples
from llmdistill.data.ngrams import normalised
from llmdistill.errors import InputError, UnusableError
from llmdistill.models.chat_template import ChatTemplate
from llmdistill.runs.inputs import file_input, sha256
from llmdistill.tasks.task import Item, Task, check_targets, items_file, read_items, read_task

KEY = "train.compare_examples"


def read_examples(settings: Examples) -> tuple[Task, list[Item], dict[str, str]]:
    """Read the task, its examples, and the path and hash of every file that they are read from.

    Raises:
        InputError: if a file is missing or unusable, an output is invalid, or an example is a held-out item.
    """
    task = read_task(settings.task, f"{KEY}.task")
    inputs = {name: sha256(path) for name, path in task.files.items()} | file_input(settings.file, f"{KEY}.file")
    items = read_items(find(settings.file))
    check_targets(items, lambda output: task.rules.verdict(task, output))
    if task.settings.test is not None:
        name, file = items_file(task)
        inputs[name] = sha256(file)
        held_out = {normalised(item.input): item.origin for item in read_items(file)}
        for item in items:
            if origin := held_out.get(normalised(item.input)):
                raise InputError(f"{item.origin}: its input equals that of {origin}, which is held out from training")
    return task, items, inputs


def example_rows(settings: Examples, tokenizer: Any, end_ids: list[int], template_args: dict[str, Any]) -> Any:
    """A `datasets.Dataset` of text without soft targets, in the student's tokens.

    Raises:
        InputError: as for `read_examples`.
        UnusableError: if the chat template refuses an example.
    """
    import datasets

    task, items, _ = read_examples(settings)
    chat, rows = ChatTemplate(tokenizer, end_ids, template_args), []
    for item in items:
        try:
            prompt_ids, ids = chat.turn_ids(task.prompt(item.input), {"role": "assistant", "content": item.output})
        except UnusableError as error:
            raise error.at(item.origin) from None
        rows.append({"id": item.id, "input_ids": prompt_ids + ids, "completion_start": len(prompt_ids)})
    return datasets.Dataset.from_list(rows).with_format("numpy")
