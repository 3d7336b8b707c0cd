"""The command among the processes of one training run."""

import signal

import pytest

from llmdistill import cli


def test_what_another_than_the_first_process_finds_alone_it_says_after_a_while(monkeypatch, capsys, tmp_path):
    waited = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", str(tmp_path / "none.yaml")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 2
    assert waited == [cli._PATIENCE]
    assert "none.yaml: no such file" in capsys.readouterr().err
