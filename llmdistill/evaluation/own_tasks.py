"""A user's own tasks (`llmdistill/tasks`) as part of `eval.tasks`: every model answers the held-out items greedily."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmdistill.errors import InputError, UnusableError
from llmdistill.evaluation.parts import Parts
from llmdistill.evaluation.serving import Requests
from llmdistill.evaluation.statistics import check_clusters
from llmdistill.evaluation.writing import Written, write_answers
from llmdistill.models.chat_template import ChatTemplate
from llmdistill.models.loading import context_length
from llmdistill.runs.progress import StageBar
from llmdistill.tasks.task import Item, Task, check_targets, items_file, read_items, read_task

_TIMES, _MORE_TOKENS = 3, 64  # times the longest right answer, plus tokens: room for indentation, a fence and an end


@dataclass(frozen=True)
class OwnTask:
    """A task with its held-out items; `files` are its file and all that it names, by their paths as in the experiment."""

    task: Task
    items: list[Item]
    files: dict[str, Path]

    @property
    def chance(self) -> float | None:
        """The score of guessing among the labels; None if an answer is not a choice among a few."""
        return 1 / len(self.task.labels) if self.task.labels else None


def read_own(file: Path) -> OwnTask:
    """Read a task file and its test; errors in either are reported before a model is loaded.

    Raises:
        InputError: if a file is missing or unusable, a right answer is invalid, or there are too few items.
    """
    task = read_task(file, "eval.tasks")
    name, found = items_file(task)
    items = read_items(found)
    check_targets(items, lambda output: task.rules.verdict(task, output))
    own = OwnTask(task, items, {**task.files, name: found})
    check_count(own, None)
    return own


def check_count(own: OwnTask, limit: int | None) -> None:
    """Refuse too few items for an interval.

    Raises:
        InputError: if there are too few.
    """
    clusters = {item.cluster for item in own.items[:limit]}
    check_clusters(len(clusters), f"items of the task {own.task.file}", "add more")


def run_own(
    tasks: Sequence[OwnTask],
    models: dict[str, Any],
    tokenizers: dict[str, Any],
    end_ids: dict[str, list[int]],
    batch_size: int,
    limit: int | None,
    template_args: dict[str, Any] | None = None,
    references: Mapping[tuple[str, str], str] | None = None,
    stage: str = "eval",
    parts: Parts | None = None,
    thinking_end: str = "</think>",
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Run every model on the same items.

    Args:
        tasks: read and checked.
        models: the models by name.
        tokenizers: tokenizer of each, with its chat template.
        end_ids: the tokens that end an answer of each.
        batch_size: sequences per forward pass.
        limit: use only the first items of each task.
        template_args: more variables of the chat template.
        references: the teacher's answers by task and item, if it is not one of the models.
        stage: name of the stage, for progress.
        parts: where the answers of each model to each task are kept, from a run with the same tasks and models.
        thinking_end: the string that ends a reasoning trace, which is not part of an answer.

    Returns:
        The rows of `tasks.parquet`; and for each task, by model, `valid`, the share of valid answers, `max_tokens`, where
        answers were cut off, and further results of its kind besides the score, such as `fields`.

    Raises:
        InputError: if a model has no chat template, or an item does not fit into its context.
        UnusableError: if its template refuses an item.
    """
    asked = [(own.task, own.items[:limit], name) for name in models for own in tasks]
    files = [f"answers-{number}" for number in range(len(asked))]
    # All of them before the first answer, so that items refused by a template are found immediately.
    prompts = [
        _prompts(task, items, models[name].config, tokenizers[name], end_ids[name], template_args or {})
        for task, items, name in asked
    ]
    rows: list[dict[str, Any]] = []
    tables: dict[str, dict[str, Any]] = {own.task.name: {"valid": {}, "max_tokens": {}} for own in tasks}
    told = dict(references or {})
    counts = [len(items) for _, items, _ in asked]
    done = sum(count for count, file in zip(counts, files, strict=True) if parts and parts.has(file))
    with StageBar(stage, sum(counts), done) as bar:
        for (task, items, name), (prompts_ids, longest), file in zip(asked, prompts, files, strict=True):
            bar.advance(0, facts=[f"{name} on {task.name}"])
            how = models[name], prompts_ids, tokenizers[name], end_ids[name], batch_size, longest, bar, thinking_end
            answers = _kept(parts, file, partial(write_answers, *how))
            if name == "teacher":
                told |= {(task.name, item.id): answer.text for item, answer in zip(items, answers, strict=True)}
            rows += [
                _row(task, name, item, answer, None if name == "teacher" else told.get((task.name, item.id)))
                for item, answer in zip(items, answers, strict=True)
            ]
            about = tables[task.name]
            about["valid"][name] = sum(task.rules.verdict(task, answer.text) is None for answer in answers) / len(answers)
            about["max_tokens"][name] = longest
            pairs = [(answer.text, item.output) for item, answer in zip(items, answers, strict=True)]
            for kind, table in task.rules.tables(task, pairs).items():
                about.setdefault(kind, {})[name] = table
        bar.advance(0, facts=["models on tasks"])
    return rows, tables


def requests_of(
    own: OwnTask, count: int, limit: int | None, config: Any, tokenizer: Any, end_ids: list[int], template_args: dict[str, Any]
) -> Requests:
    """The first items of a task as requests to a server.

    Args:
        own: the task.
        count: number of items.
        limit: number of evaluated items, whose longest right answer determines where answers are cut off.
        config: configuration of the model.
        tokenizer: its tokenizer.
        end_ids: the tokens that end its answers.
        template_args: more variables of the chat template.

    Raises:
        InputError: if an item does not fit into the model's context.
    """
    prompts, longest = _prompts(own.task, own.items[:limit], config, tokenizer, end_ids, template_args)
    return Requests(prompts[:count], longest, end_ids)


def _prompts(
    task: Task, items: list[Item], config: Any, tokenizer: Any, end_ids: list[int], template_args: dict[str, Any]
) -> tuple[list[list[int]], int]:
    """The token ids of each prompt, and the maximum number of tokens of an answer."""
    chat, found = ChatTemplate(tokenizer, end_ids, template_args), []
    longest = _TIMES * max(len(tokenizer(item.output, add_special_tokens=False)["input_ids"]) for item in items) + _MORE_TOKENS
    context = context_length(config)
    for item in items:
        try:
            found.append(chat.prompt_ids(task.prompt(item.input)))
        except UnusableError as error:
            raise error.at(item.origin) from None
        if context and len(found[-1]) + longest > context:
            raise InputError(
                f"{item.origin}: {len(found[-1]):,} tokens plus {longest:,} for an answer exceed the context of {context:,}"
            )
    return found, longest


def _kept(parts: Parts | None, file: str, answer: Callable[[], list[Written]]) -> list[Written]:
    if parts is None:
        return answer()
    return [Written(**entry) for entry in parts.result(file, lambda: [asdict(written) for written in answer()])]


def _row(task: Task, model: str, item: Item, answer: Written, reference: str | None) -> dict[str, Any]:
    return {
        "task": task.name,
        "item": item.id,
        "cluster": item.cluster,
        "model": model,
        "score": task.rules.score(task, answer.text, item.output)[task.rules.METRIC],
        "answer": answer.text,
        "target": item.output,
        "input": item.input,
        "logprobs": answer.logprobs,
        "agrees": None if reference is None else agrees(task, answer.text, reference),
    }


def agrees(task: Task, answer: str, reference: str) -> bool | None:
    """Whether an answer equals the teacher's by the measure of its kind; None for free text, which has no such measure.

    An invalid answer of the teacher is equal only to the same text.
    """
    if task.settings.kind == "generate":
        return None
    if answer == reference or task.rules.verdict(task, reference) is not None:
        return answer == reference
    return bool(task.rules.score(task, answer, reference)[task.rules.METRIC] == 1)
