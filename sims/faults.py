"""Faults that a simulation is asked for: when the process of a replica dies, and when it is back."""

from collections.abc import Sequence
from dataclasses import dataclass

from pagedkv.errors import ConfigError
from pagedkv.sims.config import parse_seconds, time_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The death of one replica's process: what it holds is lost, and it comes back with nothing."""

    at_s: float
    """When it dies, from the start of the run, warm-up included."""
    down_s: float
    """How long it is away."""
    replica: int
    """Index of the replica."""

    @property
    def back_s(self) -> float:
        """When it is back."""
        return self.at_s + self.down_s


def parse_faults(texts: Sequence[str], *, num_replicas: int, end_s: float | None) -> tuple[Fault, ...]:
    """Return the faults that `texts`, such as "300s:120s:1" or several with commas, describe, by time.

    Args:
        texts: Each AT:FOR or AT:FOR:REPLICA, replicas counted from 0; replica 0 where none is named.
        num_replicas: How many there are.
        end_s: When the run ends; None if it ends with its last request.

    Raises:
        ConfigError: If one is none, or cannot happen: a replica that is not there or down already, or a time after the end.
    """
    words = [word.strip() for text in texts for word in text.split(",")]
    faults = sorted((_fault(word, num_replicas, end_s) for word in words), key=lambda fault: (fault.at_s, fault.replica))
    for i, fault in enumerate(faults):
        for later in faults[i + 1 :]:
            if later.replica == fault.replica and later.at_s <= fault.back_s:
                at, back = time_text(later.at_s), time_text(fault.back_s)
                raise ConfigError(
                    f"--fault {at}: replica {fault.replica} is still down from {time_text(fault.at_s)} on, and back at {back}. "
                    f"Let the next fault come after that, or make the first one shorter"
                )
    return tuple(faults)


def _fault(word: str, num_replicas: int, end_s: float | None) -> Fault:
    parts = word.split(":")
    if not 1 <= len(parts) <= 3 or not parts[0]:
        raise ConfigError(
            f"--fault {word!r}: write AT:FOR or AT:FOR:REPLICA, e.g. 300s:120s, or 300s:120s:1 for the second replica"
        )
    at_s = parse_seconds(parts[0], name="--fault: time")
    if len(parts) == 1:
        raise ConfigError(
            f"--fault {word!r} does not say for how long: no machine of the catalogue has a disk rate, which would say how long a "
            f"restart takes. Write e.g. {parts[0]}:120s"
        )
    down_s = parse_seconds(parts[1], name="--fault: length")
    if down_s <= 0:
        raise ConfigError(f"--fault {word!r}: its length is {parts[1]}: needs more than 0, e.g. {parts[0]}:120s")
    replica = 0 if len(parts) == 2 else _replica(word, parts[2], num_replicas)
    if end_s is not None and at_s >= end_s:
        raise ConfigError(
            f"--fault {word!r} comes at {time_text(at_s)}, and the run ends at {time_text(end_s)}, warm-up included: "
            "let it come earlier, or give a longer --duration"
        )
    return Fault(at_s=at_s, down_s=down_s, replica=replica)


def _replica(word: str, text: str, num_replicas: int) -> int:
    if not text.isdecimal() or int(text) >= num_replicas:
        there_are = "there is only 0" if num_replicas == 1 else f"there are 0 to {num_replicas - 1}"
        raise ConfigError(f"--fault {word!r}: no replica is {text!r}; {there_are}. --replicas sets their number")
    return int(text)
