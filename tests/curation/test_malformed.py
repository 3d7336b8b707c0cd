import pytest

from llmdistill.curation.malformed import malformation
from tests.curation.steps import apply_step, table


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


def test_a_special_token_of_one_teacher_is_text_of_another(tmp_path):
    fields = [{"llmdistill": {"teacher": name}} for name in ("math", "code")]
    rows = table(["a", "b"], ids=[[9, 4, 2, 5, 7], [9, 4, 2, 5, 7]], fields=fields)
    teachers = {name: {"tokenizer": {"special_token_ids": ids}} for name, ids in (("math", [2, 7]), ("code", [5]))}
    manifest = {"tokenizer": {"special_token_ids": [0]}, "teachers": teachers}
    reasons, _ = apply_step(tmp_path, {"malformed": None}, rows, manifest=manifest)
    assert reasons == ["the special token 2 inside", "the special token 5 inside"]


@pytest.mark.parametrize(
    "answer",
    [
        "Prices: <s>20</s> 15 euros, <s>9</s> 7.",
        "### Input validation\nCheck it.",
        "### Response\nIt is fine.",
        "### Human resources\nCall them.",
    ],
)
def test_html_and_headings_are_no_marks_of_a_template(answer):
    assert malformation("q", answer) is None


@pytest.mark.parametrize("unit", ["\n", "\n ", "```\n", "~~~\n```\n", "### ", "<s>", "- ", "User", "<think>"])
@pytest.mark.timeout(120)
def test_the_time_grows_with_the_length_alone(unit):
    """400,000 characters of one thing take no second; where the time is quadratic they take an hour."""
    malformation("q", "a" + unit * (400_000 // len(unit)) + "b")
