from llmdistill.curation.steps import Failed
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
        (r"She makes **\$18** every day.", "18"),
        (r"That is 9 × \$2 = \$18", 18),
        (r"It costs \$1,200.", "1200"),
        (r"So $9 \times \$2 = \$18$.", r"\$18"),
        ("It is −5.", "-5"),
        ("3 − 8 = −5", -5),
        ("It is -5.", "−5"),
        ("To answer this question, multiply 6 by 7. The result is 42.", 42),
        ("**Answer:** 42, which took 3 steps.", 42),
        ("The answer is 42, and not 41.", 42),
    ]
    assert math(tmp_path, right) == [None] * len(right)
    assert math(tmp_path, [(r"She makes \$17.", "18")]) == ["17 is not 18"]
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
