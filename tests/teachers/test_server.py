"""The client of a teacher's server; tests/integration/test_server.py has a real one."""

import httpx
import pytest

from llmdistill.config import Generate, Targets, Teacher
from llmdistill.errors import InputError, RemoteError
from llmdistill.teachers import EngineSpec, server


@pytest.mark.parametrize(
    ("status", "error", "times"), [(401, InputError, 1), (404, InputError, 1), (500, RemoteError, server._TRIES)]
)
def test_a_refusal_is_final_and_a_fault_is_not(monkeypatch, status, error, times):
    asked = []

    def answer(self, method, path, **options):
        asked.append(path)
        return httpx.Response(status, json={"error": {"message": "no"}}, request=httpx.Request(method, f"http://host{path}"))

    monkeypatch.setattr(httpx.Client, "request", answer)
    monkeypatch.setattr(server.time, "sleep", lambda seconds: None)
    teacher = Teacher(model="a/b", engine="server", url="http://host")
    with pytest.raises(error):
        server.ServerEngine(EngineSpec(teacher, Generate(), Targets(), [1], 64))
    assert len(asked) == times
