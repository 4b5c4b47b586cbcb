"""Pages in a real browser: what they become, what it complains about, what they ask for."""

import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--enable-logging=stderr",
]


_ASKED = re.compile(r'"initiator":"(?!not an origin").*"url":"(https?://[^"]+)')
"""A request in the net log; the browser's own have no origin."""


def browse(file: Path, profile: Path, *, budget_ms: int = 5000, timeout_s: float = 120) -> tuple[str, str, list[str]]:
    """Return the DOM after so much virtual time, the browser's log, and what pages asked the network for."""
    assert CHROMIUM is not None
    net_log = profile / "net.json"
    where = [f"--user-data-dir={profile}", f"--log-net-log={net_log}"]
    options = [*_QUIET, *where, f"--virtual-time-budget={budget_ms}", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *options, file.as_uri()], capture_output=True, text=True, timeout=timeout_s, check=True)
    asked = [url for line in net_log.read_text(errors="replace").splitlines() for url in _ASKED.findall(line)]
    return done.stdout, done.stderr, asked


def complaints(log: str) -> list[str]:
    """Return what pages wrote to the console."""
    return [line for line in log.splitlines() if "CONSOLE" in line]
