import os
import signal

import pytest

from llmdistill.curation.steps import Failed
from llmdistill.curation.verify import python_blocks
from tests.curation.steps import apply_step, table


def math(tmp_path, pairs, **settings):
    rows = table([answer for answer, _ in pairs], fields=[{} if want is None else {"answer": want} for _, want in pairs])
    return apply_step(tmp_path, {"math": settings or None}, rows)[0]


def test_math_by_value_not_by_text(tmp_path):
    right = [
        ("Half of it is 3/8.", "0.375"),
        (r"So $x = \frac{1}{2}$.", "0.5"),
        (r"Therefore \boxed{2\sqrt{3}}", r"\sqrt{12}"),
        ("First 12, then 1,024.", 1024),
        (r"The solutions are $\{1, 2\}$", r"\{2, 1\}"),
        (r"$x^2 + 2x + 1$", "(x+1)^2"),
        ("50%", r"50\%"),
    ]
    assert math(tmp_path, right) == [None] * len(right)
    wrong = math(tmp_path, [("It is 41.", 42), ("I do not know.", 42), (r"\boxed{x+1}", "x+2")])
    assert wrong == ["41 is not 42", "no formula or number, expected 42", "x+1 is not x+2"]


def test_a_row_without_an_expected_answer(tmp_path):
    (verdict,) = math(tmp_path, [("4", None)])
    assert (type(verdict), verdict) == (Failed, "has no answer")
    assert math(tmp_path, [("4", None), ("5", 4)], without="keep") == [None, "5 is not 4"]


def test_what_never_ends_or_takes_all_memory_costs_its_own_row_only(tmp_path):
    """9^9^9^9 as a number of all its digits; others before and after it in the same process are judged."""
    pairs = [
        ("1", 1),
        ("$9^{9^{9^{9}}}$", "7"),
        ("2", 2),
        (r"$\sum_{k=1}^{10^{12}} \frac{\sin(k)^{k}}{k!}$", "0.1"),
        ("3", 3),
        ("4", 5),
    ]
    verdicts = math(tmp_path, pairs, timeout_s=3.0)
    assert [verdicts[n] for n in (0, 2, 4, 5)] == [None, None, None, "4 is not 5"]
    assert any(isinstance(verdicts[n], Failed) for n in (1, 3)), verdicts


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


def test_a_process_that_dies_fails_the_row_it_had(tmp_path, monkeypatch):
    from llmdistill.curation import verify

    asked = verify._Worker._exchange

    def shoot(process, request, timeout_s):
        if request.get("code") == "die":
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        return asked(process, request, timeout_s)

    monkeypatch.setattr(verify._Worker, "_exchange", staticmethod(shoot))
    rows = table(["```python\nx\n```", "```python\ndie\n```", "```python\ny\n```"])
    monkeypatch.setattr(verify, "python_blocks", lambda answer: [answer.splitlines()[1]])
    verdicts, _ = apply_step(tmp_path, {"python": None}, rows)
    assert verdicts == [None, "the process that verifies has crashed", None]
    assert isinstance(verdicts[1], Failed)


def test_the_environment_is_not_handed_on(tmp_path, monkeypatch):
    from llmdistill.curation import verify

    monkeypatch.setenv("HF_TOKEN", "secret")
    seen = {}
    start = verify.subprocess.Popen

    def watch(*arguments, **options):
        seen.update(options["env"])
        return start(*arguments, **options)

    monkeypatch.setattr(verify.subprocess, "Popen", watch)
    assert apply_step(tmp_path, {"python": None}, table(["```python\nx\n```"]))[0] == [None]
    assert "HF_TOKEN" not in seen


def test_blocks_are_taken_without_their_indentation():
    assert python_blocks("- a\n  ```python\n  if x:\n    y\n  ```\n~~~ py title\nz\n~~~") == ["if x:\n  y\n", "z\n"]
    assert python_blocks("```pyramid\nx\n```") == []
