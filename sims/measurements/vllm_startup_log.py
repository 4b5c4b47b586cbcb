"""What `vllm serve` logs when it starts: the KV cache's size, what the model and CUDA graphs took, and the settings.

Source: vLLM, gpu_worker, kv_cache_utils, gpu_model_runner and core, versions 0.8 to 0.33.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from pagedkv.errors import ConfigError
from pagedkv.sims.measurements import MEASUREMENT_FORMATS, Claims, Measurements, StartUp
from pagedkv.sims.measurements._vllm_words import SETTINGS, WEIGHTS, settings_of
from pagedkv.units import GIB

_SIZE = r"(-?[0-9.]+)\s*Gi?B"
_KV_SIZE = re.compile(rf"Available KV cache memory: {_SIZE}|the rest of the memory reserved for KV Cache is {_SIZE}")
_KV_TOKENS = re.compile(r"GPU KV cache size: ([0-9,]+) tokens")
_BLOCKS = re.compile(r"# (?:GPU|cuda) blocks: ([0-9,]+)|num_gpu_blocks is: ([0-9,]+)|block_pool\(num_gpu_blocks=([0-9]+)\)")
_WEIGHTS = re.compile(rf"Model loading took {_SIZE}|model weights take {_SIZE}")
_GRAPHS = re.compile(rf"Graph capturing finished in .*?took {_SIZE}")
_GRAPHS_SET_ASIDE = re.compile(rf"Estimated CUDA graph memory: {_SIZE}")
_VISIBLE = re.compile(rf"total_gpu_memory \({_SIZE}\)|Free memory on device[^(]*\([0-9.]+/{_SIZE}\)")
_VERSION = re.compile(r"LLM engine \(v?([0-9][0-9A-Za-z.+]*)\)|vLLM API server version ([0-9][0-9A-Za-z.+]*)")
_CONFIG_MODEL = re.compile(r"with config: model='([^']+)'")
_MODEL = re.compile(r"""(?:^|[\s{(,])['"]?model(?:_tag)?['"]?\s*[=:]\s*['"]([^'"]+)['"]""")
_QUANTIZATION = re.compile(r"""quantization['"]?\s*[=:]\s*['"]?([A-Za-z0-9_-]+)""")
_BLOCK_SIZE = re.compile(r"Block size is set to ([0-9]+)")
_SETTINGS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        name: re.compile(rf"""(?<![\w]){name}['"]?\s*(?:[=:]|\()\s*['"]?(?!None\b)([A-Za-z0-9_]+(?:\.[0-9]+)?)""")
        for name in SETTINGS
    }
)
_MARKS = (_KV_SIZE, _KV_TOKENS, _BLOCKS)


@MEASUREMENT_FORMATS.register("vllm-startup-log")
class VllmStartupLog:
    """The log as it is, colours and all; of several starts the last one."""

    looks_like: ClassVar[str] = "vLLM's log: ... Available KV cache memory: 5.43 GiB ... GPU KV cache size: 41,408 tokens ..."

    @staticmethod
    def matches(text: str) -> bool:
        """Return whether a line gives the size of the KV cache, and the text is no JSON."""
        return not text.lstrip().startswith(("{", "[")) and (
            any(mark.search(text) for mark in _MARKS) or bool(_VERSION.search(text))
        )

    @staticmethod
    def read(path: Path, text: str) -> Measurements:
        """Return what the engine had."""
        if not any(mark.search(text) for mark in _MARKS):
            raise ConfigError(
                f"{path}: a vLLM log without the size of the KV cache: needs a line such as 'GPU KV cache size: 41,408 tokens' or "
                "'Available KV cache memory: 5.43 GiB', so the log from the start until 'Application startup complete'"
            )
        size = _last(_KV_SIZE, text)
        if size is not None and float(size) <= 0:
            raise ConfigError(f"{path}: Available KV cache memory is {size} GiB: vLLM had no room and did not start")
        tokens, blocks, version = _last(_KV_TOKENS, text), _last(_BLOCKS, text), _last(_VERSION, text)
        stated = {name: found for name, pattern in _SETTINGS.items() if (found := _last(pattern, text)) is not None}
        if (block_size := _last(_BLOCK_SIZE, text)) is not None:
            stated["block_size"] = block_size
        model, quantization = _last(_CONFIG_MODEL, text) or _last(_MODEL, text), _last(_QUANTIZATION, text)
        visible = _last(_VISIBLE, text)
        return Measurements(
            path=path,
            format="vllm-startup-log",
            claims=Claims(engine="vllm", version=version, model=model, weights=WEIGHTS.get((quantization or "").lower())),
            start_up=StartUp(
                where=str(path),
                num_blocks=_number(blocks),
                block_size=_number(stated.get("block_size")),
                kv_tokens=_number(tokens),
                kv_bytes=_bytes(size),
                kv_bytes_digit=1 if size is None else _digit(size),
                weight_bytes=_bytes(_last(_WEIGHTS, text)),
                graph_bytes=_bytes(_last(_GRAPHS_SET_ASIDE, text) or _last(_GRAPHS, text)),
                visible_bytes=_bytes(visible),
                settings=settings_of(stated),
            ),
        )


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    """Return what the last match of `pattern` caught; None without one."""
    found = None
    for match in pattern.finditer(text):
        found = next(group for group in match.groups() if group is not None)
    return found


def _number(text: str | None) -> int | None:
    digits = (text or "").replace(",", "")
    return int(digits) if digits.isdecimal() and int(digits) > 0 else None


def _bytes(text: str | None) -> int | None:
    try:
        return None if text is None else round(float(text.rstrip(".")) * GIB)
    except ValueError:
        return None


def _digit(text: str) -> int:
    """Return the bytes that the last digit of a size in GiB stands for."""
    return int(GIB // 10 ** len(text.partition(".")[2]))
