"""Commands, and the messages with which they are refused."""

import shlex

import pytest

from pagedkv.sims.cli import main

SHORT = "--duration 1s --warmup 0"


def refusal(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message with which the command line refuses `arguments`."""
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(arguments))
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    return err.removeprefix("error: ")
