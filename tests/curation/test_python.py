import pytest

from llmdistill.curation.python import python_blocks
from tests.curation.steps import apply_step, table


def test_python_parses_and_is_not_run(tmp_path):
    mark = tmp_path / "ran"
    answers = [
        f"```python\nopen({str(mark)!r}, 'w')\n```",
        "```python\ndef f(:\n    pass\n```",
        "First:\n```py\nx = 1\n```\nthen:\n```Python\nfor\n```",
        "```js\nlet x = ;\n```",
        "No code at all.",
        "1. So:\n   ```python\n   if True:\n       print('\\d')\n   ```",
        "```python\nx = '\0'\n```",
        "```python\nx = 1",
    ]
    reasons, _ = apply_step(tmp_path, {"python": None}, table(answers))
    assert [reason is None for reason in reasons] == [True, False, False, True, True, True, False, True]
    assert reasons[1] == "line 1: invalid syntax"
    assert not mark.exists()
    reasons, _ = apply_step(tmp_path, {"python": {"unfenced": "parse"}}, table(["x = 1\nprint(x)", "This is prose.", answers[0]]))
    assert [reason is None for reason in reasons] == [True, False, True]


@pytest.mark.parametrize("code", ["(" * 100_000, "-" * 200_000 + "1", "[" * 5000 + "]" * 5000, "x" + ".y" * 100_000])
def test_code_that_breaks_the_parser_breaks_no_more(tmp_path, code):
    verdicts, _ = apply_step(tmp_path, {"python": None}, table([f"```python\n{code}\n```", "```python\nx = 1\n```"]))
    assert verdicts[0] is not None
    assert verdicts[1] is None


def test_blocks_are_taken_without_their_indentation():
    assert python_blocks("- a\n  ```python\n  if x:\n    y\n  ```\n~~~ py title\nz\n~~~") == ["if x:\n  y\n", "z\n"]
    assert python_blocks("```pyramid\nx\n```") == []
    assert python_blocks("```python-repl\nfoo bar\n```\n```py\n>>> x = 1\n```") == []
