"""Talking to two models: their histories, commands, interrupts, and that what they say is shown and not obeyed."""

import io
import os
import shutil
import signal
import threading

import pytest
import torch
from rich.console import Console

from llmdistill.config import Generate, load_experiment
from llmdistill.config.student import Student
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model, load_tokenizer
from llmdistill.stages import chat as module
from llmdistill.stages.chat import Speaker, chat, printable, stops_at
from llmdistill.tasks.task import read_task
from tests.tasks.make import write_task

pytestmark = pytest.mark.slow

GREEDY = [("generate.temperature", "0"), ("generate.max_tokens", "6")]


@pytest.fixture
def experiment(experiment_file, tiny, tmp_path):
    """A run whose student is the tiny teacher with other weights."""
    student = tmp_path / "run/student"
    shutil.copytree(tiny, student)
    model = load_model(str(tiny), device="cpu")
    torch.nn.init.normal_(model.model.layers[0].mlp.down_proj.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(student)
    return load_experiment(experiment_file, GREEDY)


@pytest.fixture
def talk(experiment, monkeypatch, capsys):
    """What is shown when some lines come in a pipe, and what each model was told for its last answer."""
    told = {}
    answer = Speaker.answer

    def spied(speaker, question, *rest):
        told[speaker.name] = [speaker.system, *(message["content"] for message in speaker.history), question]
        answer(speaker, question, *rest)

    monkeypatch.setattr(Speaker, "answer", spied)

    def run(*lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat(experiment)
        return capsys.readouterr().out, told

    return run


def by_hand(model, conversation, new=6):
    tokenizer = load_tokenizer(str(model), None)
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt")[
        "input_ids"
    ]
    net, start = load_model(str(model), device="cpu"), ids.shape[1]
    for _ in range(new):
        token = net(ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if token.item() == 2:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_a_line_in_a_pipe_is_answered_by_both(talk, tiny, tmp_path):
    shown, _ = talk("Hi")
    question = [{"role": "user", "content": "Hi"}]
    answers = [printable(by_hand(model, question)).strip() for model in (tiny, tmp_path / "run/student")]
    assert answers[0] != answers[1]
    assert shown.split() == f"teacher\n{answers[0]}\nstudent\n{answers[1]}".split()


def test_each_model_remembers_its_own_answers(talk, tiny, tmp_path):
    _, told = talk("Hi", "And then?")
    for name, model in {"teacher": tiny, "student": tmp_path / "run/student"}.items():
        answer = by_hand(model, [{"role": "user", "content": "Hi"}])
        assert told[name] == [None, "Hi", answer, "And then?"]


def test_commands(talk):
    shown, told = talk("Hi", "/reset", "/system Be brief.", "Who are you?", "/nonsense", "/quit", "Never asked")
    assert told == {name: ["Be brief.", "Who are you?"] for name in ("teacher", "student")}
    assert shown.count("teacher") == 2
    assert "/system TEXT" in shown
    _, told = talk("/system Be brief.", "/system", "", "Hi")
    assert told["student"] == [None, "Hi"]


def test_the_teachers_own_system_message_is_not_the_students(experiment, talk):
    experiment.teacher.system = "You are wise."
    _, told = talk("Hi")
    assert told == {"teacher": ["You are wise.", "Hi"], "student": [None, "Hi"]}


def test_of_a_task_each_line_is_an_input(experiment, talk, tmp_path):
    file = write_task(tmp_path, "classify")
    experiment.prompts.task = str(file)
    _, told = talk("Hi", "Again")
    system = read_task(file, "eval.tasks").prompt("")[0]["content"]
    assert told == {name: [system, "Again"] for name in ("teacher", "student")}
    _, told = talk("/system Be brief.", "Hi")
    assert told["student"] == ["Be brief.", "Hi"]


def test_an_interrupt_stops_the_answer_and_not_the_program(talk, monkeypatch):
    """It comes while the teacher is at work, which waits for it; both stop, and the next line is answered."""
    answer, stops = Speaker.answer, []

    def slow(speaker, question, sampling, stop):
        if question == "Hi":
            if speaker.name == "teacher":
                os.kill(os.getpid(), signal.SIGINT)
            stops.append(stop.wait(60))
        answer(speaker, question, sampling, stop)

    monkeypatch.setattr(Speaker, "answer", slow)
    before = signal.getsignal(signal.SIGINT)
    shown, told = talk("Hi", "Again")
    assert stops == [True, True]
    assert told["teacher"][1:] == ["Hi", told["teacher"][2], "Again"]
    assert shown.count("student") == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stopped_answer_keeps_what_is_there(tiny):
    model, stop = load_model(str(tiny), device="cpu"), threading.Event()
    model.generation_config.eos_token_id = None
    speaker = Speaker("teacher", model, load_tokenizer(str(tiny), None))
    calls = []
    forward = model.forward

    def counted(*arguments, **more):
        calls.append(1)
        if len(calls) == 5:
            stop.set()
        return forward(*arguments, **more)

    model.forward = counted
    speaker.answer("Hi", Generate(temperature=0, max_tokens=100), stop)
    assert len(calls) == 5
    assert [message["role"] for message in speaker.history] == ["user", "assistant"]
    assert speaker.history[1]["content"] == speaker.text


def test_whether_to_stop_is_told_on_the_device_of_the_ids():
    """`generate` joins it with what it has on that device."""
    stop, ids = threading.Event(), torch.zeros(2, 5, dtype=torch.long, device="meta")
    told = stops_at(stop)(ids, None)
    assert (told.device.type, told.shape, told.dtype) == ("meta", (2,), torch.bool)
    assert stops_at(stop)(ids.new_zeros(2, 5, device="cpu"), None).tolist() == [False, False]
    stop.set()
    assert stops_at(stop)(ids.new_zeros(2, 5, device="cpu"), None).tolist() == [True, True]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ä 漢 👩‍🔬\n\ttab", "plain ä 漢 👩‍🔬\n\ttab"),
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("\x1b]0;title\x07", "]0;title"),
        ("a\x9b2Jb\x00\x08\r", "a2Jb"),
        ("\u202eevil\u2066\u200f", "evil"),
        ("half\ud800", "half"),
    ],
)
def test_nothing_that_a_terminal_would_obey_is_left(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("width", [50, 120])
def test_markup_and_escapes_are_shown_as_text(tiny, monkeypatch, width):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=width, height=20)
    monkeypatch.setattr(module, "console", terminal)
    tokenizer = load_tokenizer(str(tiny), None)
    speakers = [Speaker(name, None, tokenizer) for name in ("teacher", "student")]
    speakers[0].text, speakers[1].text = "[bold red]no[/] [link=http://x]y[/link]", "\x1b[2J\x1b]8;;http://x\x07z"
    terminal.print(module._beside(speakers))
    lines = terminal.file.getvalue().splitlines()
    text = "\n".join(lines)
    assert "[bold red]no[/] [link=http://x]y[/link]" in text
    assert "[2J]8;;http://xz" in text.replace("\x1b[2J", "obeyed")
    assert ("teacher" in lines[0] and "student" in lines[0]) == (width == 120)


def test_a_long_answer_shows_its_end_while_it_is_written(tiny, monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, height=12)
    monkeypatch.setattr(module, "console", terminal)
    speaker = Speaker("teacher", None, load_tokenizer(str(tiny), None))
    speaker.text = "\n".join(f"line {number}" for number in range(50))
    terminal.print(module._beside([speaker, speaker], 10))
    shown = terminal.file.getvalue()
    assert "line 49" in shown
    assert "line 30" not in shown
    assert len(shown.splitlines()) <= 10


def test_too_long_a_conversation_is_said_and_not_remembered(tiny):
    speaker = Speaker("student", load_model(str(tiny), device="cpu"), load_tokenizer(str(tiny), None))
    speaker.answer("word " * 300, Generate(max_tokens=8), threading.Event())
    assert "do not fit into the student's 256; /reset starts a new conversation" in speaker.text
    assert speaker.history == []


def test_what_cannot_be_talked_to_is_refused(experiment, tiny, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(str(tiny), None)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="the student has no chat template"):
        Speaker("student", None, tokenizer)
    shutil.rmtree(tmp_path / "run/student")
    with pytest.raises(InputError, match="the student, which `train` writes"):
        chat(experiment)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"the student, which `train` writes: run/student is not a model directory"):
        chat(experiment.with_(output="run"))  # which is not looked for on the Hub
    behind = experiment.teacher.model_copy(update={"engine": "openai", "licence": "mit", "tokenizer": experiment.teacher.model})
    with pytest.raises(InputError, match=r"teacher\.engine is openai: `chat` needs the teacher's weights"):
        chat(experiment.with_(teacher=behind, student=Student(model=str(tiny))))
