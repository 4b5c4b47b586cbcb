"""Eviction by other policies than vLLM's: who goes when room is needed."""

import pytest
from cache_owner import SIZE, pool, request, serve

from pagedkv.errors import ConfigError
from pagedkv.kv_cache_manager import KVCacheManager


def test_eviction_by_name() -> None:
    with pytest.raises(ConfigError, match="eviction policy"):
        KVCacheManager(pool(eviction="newest"))
    with pytest.raises(ConfigError, match="eviction policy"):
        KVCacheManager(pool(eviction="newest"), enable_caching=False)


def left_over(eviction: str) -> list[str]:
    """Return which of three prompts are still cached after another one needed the room of one; "b" was hit once."""
    cache = KVCacheManager(pool(num_blocks=5, eviction=eviction))
    prompts = {name: [i] * SIZE for i, name in enumerate("abc")}
    for name, priority in (("a", 5), ("b", 1), ("c", 3)):
        cache_request = request([*prompts[name], 9], name, priority=priority)
        serve(cache, cache_request, SIZE)
        cache.free(cache_request)
    again = request([*prompts["b"], 9], "again")
    serve(cache, again)
    cache.free(again)
    serve(cache, request([7] * 8, "other"))
    return [name for name, tokens in prompts.items() if cache.get_computed_blocks(request([*tokens, 9]))[1]]


@pytest.mark.parametrize(
    ("eviction", "kept"), [("lru", "bc"), ("lfu", "bc"), ("fifo", "bc"), ("filo", "ab"), ("mru", "ac"), ("priority", "ac")]
)
def test_a_policy_chooses_who_goes(eviction: str, kept: str) -> None:
    assert "".join(left_over(eviction)) == kept


def test_blocks_without_a_key_go_before_any_victim() -> None:
    cache = KVCacheManager(pool(num_blocks=5, eviction="mru"))
    first = request(range(8))
    serve(cache, first)
    cache.free(first)
    assert serve(cache, request(range(50, 58), "other")) == [3, 4]
    assert cache.get_computed_blocks(request(range(9)))[0].tolist() == [1, 2]
