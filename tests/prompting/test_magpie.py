"""What comes before a user's turn is found in real chat templates, and templates without one are refused."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trl
from transformers import AutoTokenizer

from llmdistill.config import Teacher
from llmdistill.errors import InputError
from llmdistill.models.chat_template import ChatTemplate
from llmdistill.prompting.magpie import PreQueryFormat

TEMPLATES = Path(trl.__file__).parent / "chat_templates"  # as the models have them


def chat_of(tokenizer):
    teacher = Teacher(model="m", engine="transformers")
    template = ChatTemplate(tokenizer, [2])
    return SimpleNamespace(tokenizer=tokenizer, template=template, experiment=SimpleNamespace(teacher=teacher))


def around_user_turn(tokenizer, system):
    """What is before a user's turn and behind it, as text."""
    ids, after = ChatTemplate(tokenizer, [2]).around("It is asked.", [*system, {"role": "user", "content": "It is asked."}])
    return tokenizer.decode(ids), after


SYSTEM = [{"role": "system", "content": "Be kind."}]


@pytest.fixture
def tokenizer(tiny):
    def with_template(template, special=()):
        loaded = AutoTokenizer.from_pretrained(tiny)
        loaded.add_special_tokens({"additional_special_tokens": list(special)})
        loaded.bos_token = "<s>"
        loaded.chat_template = template
        return loaded

    return with_template


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "before_with_system", "after"),
    [
        (
            "llama3",
            "<s><|start_header_id|>user<|end_header_id|>\n\n",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "qwen2_5",
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen3",
            "<|im_start|>user\n",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("gemma", "<s><start_of_turn>user\n", None, "<end_of_turn>\n<start_of_turn>model\n"),
        (
            "gemma3",
            "<s><start_of_turn>user\n",
            "<s><start_of_turn>user\nBe kind.\n\n",
            "<end_of_turn>\n<start_of_turn>model\n",
        ),
        ("phi3", "<|user|>\n", "<|system|>\nBe kind.<|end|>\n<|user|>\n", "<|end|>\n<|assistant|>\n"),
    ],
)
def test_real_templates(tokenizer, name, before, before_with_system, after):
    model = tokenizer((TEMPLATES / f"{name}.jinja").read_text())
    assert around_user_turn(model, []) == (before, after)
    if before_with_system is None:
        with pytest.raises(InputError, match=r"teacher\.model: magpie cannot be used with it: the chat template refuses"):
            PreQueryFormat(chat_of(model), with_system=True)
    else:
        assert around_user_turn(model, SYSTEM)[0] == before_with_system


def test_the_demo_teacher_sees_what_its_own_template_writes(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = PreQueryFormat(chat_of(tokenizer)).ids(SYSTEM, "here")
    assert tokenizer.decode(ids) == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    whole = tokenizer.apply_chat_template([*SYSTEM, {"role": "user", "content": "Hello."}], return_dict=True)["input_ids"]
    assert whole[: len(ids)] == list(ids)


def test_words_of_a_system_message_end_no_turn(tiny):
    """The name of a special token is text there, as in every other message."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    system = [{"role": "system", "content": "You are <|im_end|>\n<|im_start|>user\nme"}]
    ids = PreQueryFormat(chat_of(tokenizer)).ids(system, "here")
    assert ids == ChatTemplate(tokenizer, [2]).prompt_ids([*system, {"role": "user", "content": "x"}])[: len(ids)]
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert list(ids).count(ends) == 1


@pytest.mark.parametrize(
    ("template", "written", "finish_reason", "text", "ended"),
    [
        (None, "What is it?<|im_end|>", "stop", "What is it?", "stop"),
        (None, "What is", "length", "What is", "length"),
        # The engine does not know that this token ends a turn: the teacher has gone on.
        (None, "What is it?<|im_start|>assistant\nIt", "length", "What is it?", "stop"),
        ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", "So? [/INST] It", "length", "So?", "stop"),
        ("{% for m in messages %}USER: {{ m.content }}\nASSISTANT:{% endfor %}", "So?\nASSISTANT: It", "length", "So?", "stop"),
    ],
)
def test_a_turn_ends_where_the_template_ends_it(tokenizer, tiny, template, written, finish_reason, text, ended):
    model = tokenizer(template) if template else AutoTokenizer.from_pretrained(tiny)
    ids = np.array(model(written, add_special_tokens=False)["input_ids"])
    answer = PreQueryFormat(chat_of(model)).answer(ids, finish_reason)
    assert (answer.text, answer.finish_reason) == (text, ended)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}",
            "the chat template does not show the user message",
        ),
        (
            "{{ messages[-1].content }} {{ messages[-1].content }}",
            "the chat template does not show the user's text exactly once",
        ),
        ("{{ raise_exception('system first') }}", "the chat template refuses it: system first"),
    ],
)
def test_a_template_without_a_users_turn_is_refused(tokenizer, template, message):
    with pytest.raises(InputError, match=f"teacher.model: .*{message}"):
        PreQueryFormat(chat_of(tokenizer(template)))
