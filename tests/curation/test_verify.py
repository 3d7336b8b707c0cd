import os
import signal

from llmdistill.curation import python, verify
from llmdistill.curation.steps import Failed
from tests.curation.steps import apply_step, table


def test_a_process_that_dies_fails_the_row_it_had(tmp_path, monkeypatch):
    asked = verify.Worker._exchange

    def shoot(process, request, timeout_s):
        if request.get("code") == "die":
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        return asked(process, request, timeout_s)

    monkeypatch.setattr(verify.Worker, "_exchange", staticmethod(shoot))
    rows = table(["```python\nx\n```", "```python\ndie\n```", "```python\ny\n```"])
    monkeypatch.setattr(python, "python_blocks", lambda answer: [answer.splitlines()[1]])
    verdicts, _ = apply_step(tmp_path, {"python": None}, rows)
    assert verdicts == [None, "the verification process crashed", None]
    assert isinstance(verdicts[1], Failed)


def test_the_environment_is_not_handed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    seen = {}
    start = verify.subprocess.Popen

    def watch(*arguments, **options):
        seen.update(options["env"])
        return start(*arguments, **options)

    monkeypatch.setattr(verify.subprocess, "Popen", watch)
    assert apply_step(tmp_path, {"python": None}, table(["```python\nx\n```"]))[0] == [None]
    assert "HF_TOKEN" not in seen
