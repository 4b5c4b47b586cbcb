"""The meta.json of a vLLM log as `simulate validate --data` takes it: the engine's settings and the size of its KV cache."""

from pathlib import Path
from typing import ClassVar

from pagedkv.errors import ConfigError
from pagedkv.sims.measurements import MEASUREMENT_FORMATS, Claims, Measurements, StartUp, whole
from pagedkv.sims.measurements._vllm_words import settings_of
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._json_text import at, json_document


@MEASUREMENT_FORMATS.register("vllm-meta-json")
class VllmMetaJson:
    """One object with vllm_version, model, engine_kwargs, kv_cache and hardware."""

    looks_like: ClassVar[str] = 'a vLLM log\'s meta.json: {"vllm_version": ..., "kv_cache": {"num_gpu_blocks": ...}, ...}'

    @staticmethod
    def matches(text: str) -> bool:
        """Return whether the object has vllm_version and kv_cache."""
        return {"vllm_version", "kv_cache"} <= Head.of(text).keys

    @staticmethod
    def read(path: Path, text: str) -> Measurements:
        """Return what the engine had."""
        meta = json_document(path, text)
        settings, cache, device = (at(meta, key) or {} for key in ("engine_kwargs", "kv_cache", "hardware"))
        if not isinstance(cache, dict) or not isinstance(settings, dict):
            raise ConfigError(f"{path}: engine_kwargs and kv_cache must be objects")
        stated = {**settings, **cache}
        visible = at(device, "device_total_memory_bytes")
        replayed = (path.parent / "requests.jsonl").is_file()
        notes = (f"requests of {path.parent} are not fitted here: simulate validate --data replays them",) if replayed else ()
        return Measurements(
            path=path,
            format="vllm-meta-json",
            claims=Claims(
                engine="vllm",
                version=str(meta["vllm_version"]),
                model=str(meta["model"]) if at(meta, "model") else None,
                device=str(at(device, "device_name")) if at(device, "device_name") else None,
            ),
            start_up=StartUp(
                where=str(path),
                num_blocks=whole(cache.get("num_gpu_blocks"), str(path), "kv_cache.num_gpu_blocks", least=2),
                block_size=whole(cache.get("block_size"), str(path), "kv_cache.block_size", least=1),
                visible_bytes=int(visible) if isinstance(visible, int) and visible > 0 else None,
                settings=settings_of(stated),
            ),
            notes=notes,
        )
