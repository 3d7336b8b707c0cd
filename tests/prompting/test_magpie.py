"""What comes before a user's turn is found in real chat templates, and templates without one are refused."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trl
from transformers import AutoTokenizer

from llmdistill.config import Teacher
from llmdistill.errors import InputError
from llmdistill.prompting.magpie import PreQueryFormat, around_user_turn

TEMPLATES = Path(trl.__file__).parent / "chat_templates"  # as the models have them


def chat_of(tokenizer):
    teacher = Teacher(model="m", engine="transformers")
    return SimpleNamespace(tokenizer=tokenizer, experiment=SimpleNamespace(teacher=teacher))


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
        with pytest.raises(InputError, match="its chat template refuses"):
            around_user_turn(model, SYSTEM)
    else:
        assert around_user_turn(model, SYSTEM)[0] == before_with_system


def test_the_demo_teacher_sees_what_its_own_template_writes(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = PreQueryFormat(chat_of(tokenizer)).ids(SYSTEM, "here")
    assert tokenizer.decode(ids) == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    whole = tokenizer.apply_chat_template([*SYSTEM, {"role": "user", "content": "Hello."}], return_dict=True)["input_ids"]
    assert whole[: len(ids)] == list(ids)


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
            "has no user's turn that a teacher could write",
        ),
        ("{{ messages[-1].content }} {{ messages[-1].content }}", "has no user's turn that a teacher could write"),
        ("{{ raise_exception('system first') }}", "its chat template refuses a conversation with a user's turn: system first"),
    ],
)
def test_a_template_without_a_users_turn_is_refused(tokenizer, template, message):
    with pytest.raises(InputError, match=f"teacher.model: .*{message}"):
        PreQueryFormat(chat_of(tokenizer(template)))
