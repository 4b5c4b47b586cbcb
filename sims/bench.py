"""How fast the command line is: `python -m pagedkv.sims.bench [--trace AZURE_CSV]`. Prints medians and ratios, not verdicts.

The baseline of the whole-process figures is a Python process that only imports what any run needs, measured in the same minute.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_IMPORTS = ["-c", "import numba, simpy, rich.table, cyclopts"]
_CLI = ["-c", "from pagedkv.sims.cli import main; main()"]
_USERS_100 = [*_CLI, "--users", "100", "--json", "-"]


def timed(arguments: list[str], *, cache: Path) -> tuple[float, float]:
    """Return (wall seconds, peak memory in MB) of a Python process with `arguments`, kernels cached in `cache`."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    start_s = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start_s
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--trace", type=Path, help="the Azure conversation trace: adds the 5,000-request run")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        cases = {"imports only (baseline)": _IMPORTS, "simulate --help": [*_CLI, "--help"], "simulate --users 100": _USERS_100}
        if options.trace:
            trace = ["--trace", str(options.trace), "--num-prompts", "5000", "--allocator", "paged", "--json", "-"]
            cases["5,000 requests of the Azure trace, paged"] = [*_CLI, *trace]
        first = timed(_USERS_100, cache=cache)
        print(f"{'simulate --users 100, first run (compiles)':48} {first[0]:6.2f} s {first[1]:6.0f} MB")  # noqa: T201
        baseline_s = 0.0
        for name, arguments in cases.items():
            timed(arguments, cache=cache)
            runs = [timed(arguments, cache=cache) for _ in range(options.runs)]
            seconds = statistics.median(run[0] for run in runs)
            baseline_s = baseline_s or seconds
            memory = max(run[1] for run in runs)
            print(f"{name:48} {seconds:6.2f} s {memory:6.0f} MB  {seconds / baseline_s:5.2f} × baseline")  # noqa: T201


if __name__ == "__main__":
    main()
