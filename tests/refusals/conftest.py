"""Lets these tests import what they share, and runs each among files that are right and files that are wrong."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

FILES = {
    "good.csv": "arrival_s,input_tokens,output_tokens\n0,90,9\n0.4,900,3\n",
    "bad.csv": "arrival_s,input_tokens,output_tokens\n0,90,9\n1,many,9\n",
    "late.csv": "arrival_s,input_tokens,output_tokens\n0,90,9\nsoon,90,9\n",
    "empty.csv": "",
    "other.csv": "from,to\n1,2\n",
    "far_too_long.csv": "arrival_s,input_tokens,output_tokens\n0,40000,10\n1,500000,10\n",
    "long.csv": "arrival_s,input_tokens,output_tokens\n0,40000,10\n1,50000,10\n",
    "lengths.csv": "input_tokens,output_tokens\n90,9\n",
    "bad_lengths.csv": "input_tokens,output_tokens\n90,0\n",
    "good.toml": "users = 3\nduration = '1s'\nwarmup = '0'\n",
    "unknown.toml": "users = 3\nusres = 4\n",
    "type.toml": 'users = "many"\n',
    "list.toml": "users = [3]\n",
    "choice.toml": 'users = 3\nover-length = "ignore"\n',
    "broken.toml": "users = = 3\n",
    "latin1.toml": "users = 3 # \udce9\n",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    monkeypatch.chdir(tmp_path)
    return tmp_path
