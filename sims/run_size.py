"""What a run of many users takes of the computer that simulates it, to be said before it begins."""

import os
from collections.abc import Iterable
from pathlib import Path

from pagedkv.errors import ConfigError
from pagedkv.sims.load import ClosedLoop
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.workload import Workload
from pagedkv.units import gib

_USER = {ClosedLoop: (5_000, 0.15e-3), Workload: (14_000, 0.9e-3)}
"""Bytes of a user, and seconds that each run spends on one before it has served anybody. Measured on a server's core: 4.9 KB and
0.1 to 0.3 ms at --users 100000, 13 KB and 0.9 ms at --workload chat --users 30000. Requests take 190 bytes and 5 µs each."""
LONG_S = 60.0
"""Seconds from which something is said."""


def check_size(scenarios: Iterable[Scenario]) -> str | None:
    """Return what the users of these runs, one after the other, take here if that is much, as a sentence; else None.

    Raises:
        ConfigError: If they take more memory than there is, with how many users would fit.
    """
    each = [(users_of(scenario), scenario) for scenario in scenarios]
    users, largest = max(each, key=lambda pair: pair[0], default=(0, None))
    if largest is None or users == 0:
        return None
    user_bytes, user_s = _USER[type(largest.load)]
    needed = users * user_bytes
    seconds = sum(user_s * number * len(of.allocators) * of.config.measurement.repeats for number, of in each)
    total, available = memory_here()
    if total is not None and needed > total:
        raise ConfigError(
            f"--users {users}: simulating them takes about {gib(needed)} of memory, and this computer has {gib(total)}; "
            f"--users {total // 2 // user_bytes} would do"
        )
    if seconds < LONG_S and (available is None or needed <= available):
        return None
    short = "" if available is None or needed <= available else f", more than the {gib(available)} that are available"
    least = f"{seconds:,.0f} seconds" if seconds < 120 else f"{seconds / 60:,.0f} minutes"
    return f"{users:,} users take about {gib(needed)} of this computer's memory{short}, and {least} or more"


def users_of(scenario: Scenario) -> int:
    """Return how many people are simulated one by one; 0 if requests arrive by themselves."""
    load = scenario.load
    if isinstance(load, ClosedLoop):
        return load.users
    return sum(load.num_users) if isinstance(load, Workload) and load.is_closed else 0


def memory_here() -> tuple[int | None, int | None]:
    """Return (bytes of this computer's memory, those that are available); None where it does not say."""
    try:
        total: int | None = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        total = None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    except (OSError, ValueError):
        available = None
    return total, available
