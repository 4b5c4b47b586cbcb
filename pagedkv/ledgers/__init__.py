"""Ledgers: how each engine divides a machine's memory. One file per engine, under the engine's name."""

from pagedkv.memory_request import Ledger
from pagedkv.registry import Registry

LEDGERS: Registry[type[Ledger]] = Registry(__name__, kind="ledger")
"""Each choice is the dataclass of the engine's own memory settings."""
