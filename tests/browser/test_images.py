"""The figures of a report as files, by kaleido and a real browser."""

import shlex
import struct
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pagedkv.sims.cli import main

from .chromium import CHROMIUM
from .conftest import RUN

pytest.importorskip("kaleido", reason="figures become files by kaleido: pip install 'pagedkv[images]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def test_every_figure_is_a_picture_in_both_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(f"{RUN} --users 20 --allocator paged --images {tmp_path}"))
    assert f"Written: {tmp_path}" in capsys.readouterr().err
    names = {file.stem for file in tmp_path.iterdir()}
    assert names >= {"budget", "kinds", "map-paged", "requests", "latency-ttft", "slowest"}
    for name in names:
        drawing = ET.parse(tmp_path / f"{name}.svg").getroot()
        head = (tmp_path / f"{name}.png").read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", head[16:24])
        assert (width, height) == (2 * float(drawing.attrib["width"]), 2 * float(drawing.attrib["height"]))
