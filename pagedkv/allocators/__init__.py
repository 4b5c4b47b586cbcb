"""Allocators, one per file. A new one is a new file here: see `pagedkv.allocation.Allocator` for what it must do."""

from collections.abc import Callable
from typing import TypeAlias

from pagedkv.allocation import Allocator, KVPoolSettings
from pagedkv.registry import Registry

AllocatorFactory: TypeAlias = Callable[[KVPoolSettings], Allocator]

ALLOCATORS: Registry[AllocatorFactory] = Registry(__name__, kind="allocator")
