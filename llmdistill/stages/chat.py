"""`llmdistill chat`: talk to the teacher and the student side by side in the terminal, each with its own history."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmdistill.config import Experiment, Generate
from llmdistill.errors import InputError, UnusableError
from llmdistill.models.chat_template import ChatTemplate
from llmdistill.models.loading import check_model_exists, context_length, load_model, load_tokenizer, plain_generation
from llmdistill.prompting.task_prompt import read_task_prompt
from llmdistill.runs.progress import console, printable, say, working

_HELP = "/reset clears the conversation, /system TEXT sets the system message, /quit or Ctrl-D exits, Ctrl-C stops an answer"
_SIDE_BY_SIDE = 80  # columns of a terminal from which on two answers stand beside each other


def chat(experiment: Experiment, dry_run: bool = False) -> None:
    """Answer typed input, or lines from a pipe, until it ends.

    With `prompts.task` each line is an input of the task, and a conversation of its own.

    Raises:
        InputError: if a model is missing, is behind an API, or has no chat template.
    """
    teacher, student = experiment.teacher, str(experiment.directory("student"))
    if teacher.abilities.api:
        raise InputError(f"teacher.engine is {teacher.engine}: `chat` needs the teacher's weights")
    check_model_exists(teacher.model, "teacher.model")
    check_model_exists(experiment.directory("student"), "the student, which `train` writes")
    if dry_run:
        say("chat", f"would load {teacher.model} and {student}")
        return
    task = experiment.prompts.task if experiment.prompts else None
    told = read_task_prompt(task).task.told if task else None
    with working("chat", "loading the models") if sys.stdout.isatty() else nullcontext():
        how = (teacher.revision, teacher.dtype, teacher.trust_remote_code)
        tokenizer = load_tokenizer(teacher.model, teacher.revision, teacher.trust_remote_code)
        speakers = [
            Speaker("teacher", load_model(teacher.model, *how), tokenizer, teacher.system or told, teacher.template_args),
            Speaker("student", load_model(student), load_tokenizer(student, None), told, teacher.template_args),
        ]
    if sys.stdin.isatty():
        console.print(_HELP, style="dim", markup=False)
    for line in _lines():
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            break
        if command == "/reset":
            for speaker in speakers:
                speaker.history.clear()
        elif command == "/system":
            for speaker in speakers:
                speaker.system = rest.strip() or None
        elif command.startswith("/"):
            console.print(_HELP, markup=False)
        elif line.strip():
            if task:
                for speaker in speakers:
                    speaker.history.clear()
            _answer(speakers, line.strip(), experiment.generate)


class Speaker:
    """A model with its side of the conversation."""

    def __init__(
        self, name: str, model: Any, tokenizer: Any, system: str | None = None, variables: dict[str, Any] | None = None
    ) -> None:
        if tokenizer.chat_template is None:
            raise InputError(f"the {name} has no chat template, which `chat` needs")
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, (), variables)
        self.system = system
        self.history: list[dict[str, str]] = []
        self.text = ""
        """Of the answer at work."""

    def answer(self, question: str, sampling: Generate, stop: threading.Event) -> None:
        """Write `text`, and add question and answer to the history; if `stop` is set, with the answer so far."""
        import torch
        from transformers import StoppingCriteriaList, TextStreamer

        speaker, told = self, [{"role": "system", "content": self.system}] if self.system else []
        told += [*self.history, {"role": "user", "content": question}]

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                speaker.text += text

        self.text = ""
        try:
            ids_BT = torch.tensor([self.template.prompt_ids(told)], device=self.model.device)
        except UnusableError as error:
            self.text = f"[{self.name}: {error}]"
            return
        limit, length = context_length(self.model.config), ids_BT.shape[1]
        if limit and length + sampling.max_tokens > limit:
            self.text = (
                f"[{length:,} tokens and an answer do not fit into the {self.name}'s {limit:,}; /reset starts a new conversation]"
            )
            return
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        with torch.inference_mode(), plain_generation(self.model):
            self.model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                **({"do_sample": True, **drawn} if sampling.temperature > 0 else {"do_sample": False}),
                max_new_tokens=sampling.max_tokens,
                pad_token_id=self.tokenizer.pad_token_id or 0,
                streamer=Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=StoppingCriteriaList([stops_at(stop)]),
            )
        self.history += [told[-1], {"role": "assistant", "content": self.text}]


def stops_at(stop: threading.Event) -> Callable[[Any, Any], Any]:
    """A stopping criterion for `generate`: all sequences end once the event is set."""
    import torch

    return lambda ids, scores: torch.full((len(ids),), stop.is_set(), device=ids.device)


def _lines() -> Iterator[str]:
    """The typed line; an interrupt at the prompt begins a new one."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  # input() then edits and remembers lines

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


def _answer(speakers: list[Speaker], question: str, sampling: Generate) -> None:
    """All speakers at once, shown while they write if there is a terminal."""
    stop, failures = threading.Event(), list[BaseException]()

    def work(speaker: Speaker) -> None:
        try:
            speaker.answer(question, sampling, stop)
        except BaseException as error:
            failures.append(error)

    for speaker in speakers:
        speaker.text = ""
    threads = [threading.Thread(target=work, args=(speaker,), daemon=True) for speaker in speakers]
    interrupted = signal.signal(signal.SIGINT, lambda signum, frame: stop.set())
    try:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(0.05)
                if console.is_terminal:
                    live.update(_beside(speakers, console.height - 2), refresh=True)
    finally:
        signal.signal(signal.SIGINT, interrupted)
    if failures:
        raise failures[0]
    console.print(_beside(speakers))


def _beside(speakers: list[Speaker], lines: int | None = None) -> RenderableType:
    """The answers side by side if the terminal is wide, else below each other; only their last lines."""
    wide = console.is_terminal and console.width >= _SIDE_BY_SIDE
    width = console.width // len(speakers) - 2 if wide else console.width
    room = lines if lines is None or wide else lines // len(speakers)
    texts = [Text(printable(speaker.text).strip()) for speaker in speakers]
    if room is not None:
        texts = [Text("\n").join(text.wrap(console, width)[-max(room - 1, 1) :]) for text in texts]
    if not wide:
        return Group(*(Group(Text(speaker.name, style="bold"), text) for speaker, text in zip(speakers, texts, strict=True)))
    table = Table(*(speaker.name for speaker in speakers), box=None, expand=True, header_style="bold", padding=(0, 2, 0, 0))
    table.add_row(*texts)
    return table
