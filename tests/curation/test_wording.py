import pytest

from llmdistill.curation.wording import malformation
from tests.curation.steps import apply_step, table

REFUSING = [
    "I'm sorry, but I can't assist with that request.",
    "I’m sorry, but I can’t help with that.",
    "I am very sorry, but as an assistant I am unable to provide medical advice.",
    "Sorry, I cannot fulfill this request.",
    "Unfortunately, I am not able to access the internet.",
    "My apologies for any inconvenience. I'm afraid I'm unable to assist you with your sauce.",
    "I cannot provide instructions for that.",
    "  I won't help you with this.",
    "As an AI language model, I do not have hobbies.",
    "That is a deep question. As an AI, I can only tell what I have read.",
    "Hello! I am an artificial intelligence made to be helpful.",
    "I'm ChatGPT, a large language model trained by OpenAI.",
    "I'm Claude, an AI assistant.",
    "I am Qwen, created by Alibaba Cloud.",
    "I was developed by a team at Hugging Face.",
    "My knowledge cutoff is in 2023, so I may be wrong.",
    "It tastes sweet, but I don't have personal experiences.",
    "As a chatbot, I am equipped with many facts.",
]
HONEST = [
    "Dear Ms Lee,\n\nI'm sorry, but I can't attend the meeting on Friday, and I cannot provide the report before Monday.",
    "I can't help but wonder at the wall before me.",
    "I'm sorry for your loss. I can't imagine how hard this is, but here are some words you could use.",
    "As an AI researcher, I work on speech.",
    "ChatGPT was developed by OpenAI, and Claude by Anthropic; both are large language models.",
    "I am a nurse, and my training took three years.",
    "I am Claude Monet, and these are my lilies.",
    "An AI cannot provide love, said the robot.",
    "Sorry! The correct answer is 12.",
    "You can't divide by zero, as there is no number that gives the dividend back.",
    "The assistant was created by the school board.",
]


def test_refusals_and_self_identification(tmp_path):
    reasons, _ = apply_step(tmp_path, {"refusals": None}, table(REFUSING + HONEST))
    missed = [text for text, reason in zip(REFUSING, reasons, strict=False) if reason is None]
    wrong = [(text, reason) for text, reason in zip(HONEST, reasons[len(REFUSING) :], strict=True) if reason is not None]
    assert (missed, wrong) == ([], [])


def test_patterns_of_ones_own(tmp_path):
    rows = table(["Made by ACME.", "Made by hand.", "x" * 40 + "!"])
    reasons, _ = apply_step(tmp_path, {"refusals": {"patterns": ["by acme", "^(x|xx)+$"]}}, rows)
    assert reasons[:2] == ["by ACME", None]
    assert (type(reasons[2]).__name__, reasons[2]) == ("Failed", "a pattern took more than 1 s")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("Hello.<|im_end|>\n<|im_start|>user\nAnd you?", "the marker <|im_end|>"),
        ("Hello. </s>", "the marker </s>"),
        ("Hi [INST] more", "the marker [INST]"),
        ("Fine.\n### Instruction:\nAnother one", "the marker ### Instruction:"),
        ("Fine.\n\nHuman: And now?", "the role Human:"),
        ("**User**: what?\nAssistant: that", "the role User:"),
        ("```python\nprint(1)", "a code fence is left open"),
        ("text\n```\n", "a code fence is left open"),
        ("````\n```\n", "a code fence is left open"),
        ("<think>Let me see", "the tags <think>"),
        ("<think>a</think>b</think>", "the tags <think> </think> </think>"),
        ("a</think>b<think>", "the tags </think> <think>"),
    ],
)
def test_malformed(answer, reason):
    assert malformation("A question", answer) == reason


@pytest.mark.parametrize(
    "answer",
    [
        "Hello.",
        "```python\nprint(1)\n```\nand\n~~~\nx\n~~~",
        "````markdown\n```\ncode\n```\n````\nDone.",
        "1. First\n   ```sh\n   ls\n   ```\n2. Second",
        "> ```\n> quoted\n> ```",
        "Use ```x``` in a line.",
        "<think>Let me see.</think>\n\n42",
        "which is 42.</think>\n\n42",
        "The chat format puts `<|im_start|>` before a role:\n```\n<|im_start|>user\nHuman: hi\n```",
        "The user: a person. In HTML, 3 < 4 and x | y.",
        "### Times\nThey are short.",
    ],
)
def test_well_formed(answer):
    assert malformation("A question", answer) is None


def test_what_the_prompt_asks_for_is_no_malformation():
    assert malformation("Write a chat between a human and a robot.", "Human: hi\nRobot: beep") is None
    assert malformation("What does [INST] mean?", "[INST] opens an instruction.") is None


def test_special_tokens_inside_are_found_in_the_ids(tmp_path):
    """Their text is not in the answer, which was decoded without them."""
    rows = table(["a", "b", "c"], ids=[[9, 4, 5, 2], [9, 4, 2, 5, 2], [0, 4, 5, 6]])
    manifest = {"tokenizer": {"special_token_ids": [0, 2]}}
    reasons, _ = apply_step(tmp_path, {"malformed": None}, rows, manifest=manifest)
    assert reasons == [None, "the special token 2 inside", None]
