"""One of the user's own tasks instead of a template: the field `input` of a row, as in training and evaluation."""

from dataclasses import dataclass

from llmdistill.data.jsonl import Fields
from llmdistill.data.rows import Messages
from llmdistill.errors import UnreadableError
from llmdistill.prompting.template import check_field
from llmdistill.runs.inputs import sha256
from llmdistill.tasks.task import Task, read_task

KEY = "prompts.task"


@dataclass(frozen=True)
class TaskPrompt:
    """The task of `prompts.task`."""

    task: Task
    variables: tuple[str, ...] = ("input",)

    @property
    def inputs(self) -> dict[str, str]:
        """Path and hash of its files, except its held-out items."""
        return {name: sha256(file) for name, file in self.task.files.items()}

    def render(self, fields: Fields, origin: str) -> Messages:
        """The conversation about an item.

        Raises:
            UnreadableError: names the item's origin, whose input is missing or no text.
        """
        check_field(fields, "input", origin, KEY)
        if not isinstance(fields["input"], str) or not fields["input"].strip():
            raise UnreadableError(f"input must be text ({KEY})", origin)
        return self.task.prompt(fields["input"])


def read_task_prompt(file: str) -> TaskPrompt:
    """Read the task of `prompts.task`; loads no model.

    Raises:
        InputError: it, or a file that it names, is missing or cannot be used.
    """
    return TaskPrompt(read_task(file, KEY))
