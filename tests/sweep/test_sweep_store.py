"""The folder of a sweep: another one's is refused, and no file of somebody else is overwritten."""

from pathlib import Path

import pytest
from small_sweep import FINAL, FLAGS, grid

from pagedkv.errors import ConfigError
from pagedkv.sims import sweep_store
from pagedkv.sims.sweep import run_sweep
from pagedkv.sims.sweep_store import open_store


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("8s", "9s"), "--duration is 8s there, 9s here"),
        (("tpot:40", "tpot:50"), "--goodput is ttft:400 tpot:40 there, ttft:400 tpot:50 here"),
        (("8s", "8s --seed 3"), "--seed is 0 there, 3 here"),
        (
            ("--num-gpu-blocks-override 100,200", "--num-gpu-blocks-override 100"),
            "--users --num-gpu-blocks-override there, --users here",
        ),
    ],
)
def test_the_folder_of_another_sweep_is_refused(change: tuple[str, str], message: str, undisturbed: Path) -> None:
    before = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    with pytest.raises(ConfigError, match="holds another sweep") as error:
        run_sweep(grid(FLAGS.replace(*change)), undisturbed, workers=1)
    assert message in str(error.value)
    assert {path.name: path.read_bytes() for path in undisturbed.iterdir()} == before


def test_another_version_or_a_changed_file_is_another_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("input_tokens,output_tokens\n90,9\n")
    swept = grid(f"--users 1,2 --lengths {lengths} --duration 1s --warmup 0")
    with open_store(tmp_path / "x", swept):
        pass
    lengths.write_text("input_tokens,output_tokens\n90,8\n")
    with pytest.raises(ConfigError, match="has changed since"), open_store(tmp_path / "x", swept):
        pass
    monkeypatch.setattr(sweep_store, "__version__", "9.9")
    with pytest.raises(ConfigError, match=r"pagedkv is .* there, 9\.9 here"), open_store(tmp_path / "x", swept):
        pass


def test_two_sweeps_at_once_are_refused(tmp_path: Path) -> None:
    with open_store(tmp_path, grid(FLAGS)), pytest.raises(ConfigError, match="another sweep is writing"):
        run_sweep(grid(FLAGS), tmp_path, workers=1)


@pytest.mark.parametrize("damage", ["{", "[]", '{"base": 3}'])
def test_a_damaged_header_is_refused(damage: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(damage)
    with pytest.raises(ConfigError, match="cannot read"), open_store(tmp_path, grid(FLAGS)):
        pass


@pytest.mark.parametrize("name", FINAL)
def test_a_file_of_somebody_else_is_not_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"has a {name} that is no sweep's"), open_store(tmp_path, grid(FLAGS)):
        pass
    assert (tmp_path / name).read_text() == "mine"


def test_lines_without_a_header_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"without its sweep\.json"), open_store(tmp_path, grid(FLAGS)):
        pass
