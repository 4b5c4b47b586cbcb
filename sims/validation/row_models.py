"""Which model and weight format a published row is about, by row_models.toml or by the catalogue's names; or why it is left out."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pagedkv.catalogue import load_model
from pagedkv.errors import ConfigError
from pagedkv.hf_config import model_from_config
from pagedkv.kv_spec import LayerGroup
from pagedkv.model_spec import ModelSpec
from pagedkv.sims.validation.benchmark_rows import BenchmarkRow
from pagedkv.weight_format import WEIGHT_FORMATS, WeightFormat, load_weight_format

_FILE = Path(__file__).with_name("row_models.toml")
_SIZED = "UD-Q4_K_XL (16.68 GiB)"
_MARLIN = "-marlin"
"""After a weight type: vLLM's Marlin kernels widen the weights and multiply in bf16, whatever else could multiply them."""
_OF_CHECKPOINT = ("bits_per_weight", "dense_bits")
"""What a published checkpoint may store otherwise than its weight type's name says."""
_FORMAT_NAMES: Mapping[tuple[str, str], str] = {
    ("llama-cpp", "mxfp4"): "mxfp4+q8_0",
    ("llama-cpp", "q4_k_xl"): "q4_k_m",
}
"""Weight formats under the names that an engine's users write, where those mean something else elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowModel:
    """What a row ran."""

    model: ModelSpec
    weight_format: WeightFormat
    source: str
    """How it is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusion:
    """Why a row, or a figure of it, is left out."""

    reason: str


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))


def excluded(row: BenchmarkRow, kind: str) -> Exclusion | None:
    """Return why the `kind` figure ("prefill" or "decode") of a row is left out; None: it is not."""
    if not row.verified:
        return Exclusion(reason=f"marked verified=no: {row.note.rpartition(';')[2].strip() or 'no reason given'}")
    for entry in _table()["excluded"]:
        if row.model in entry.get("models", ()) or row.weight_dtype in entry.get("weights", ()):
            return Exclusion(reason=entry["reason"])
        for figure in entry.get("figures", ()):
            same = (row.source, row.model, row.batch, row.prompt_tokens) == tuple(
                figure[key] for key in ("source", "model", "batch", "prompt")
            )
            if same and kind in figure and figure[kind] == getattr(row, f"{kind}_tok_s"):
                return Exclusion(reason=entry["reason"])
    return None


def model_of(name: str, weight_dtype: str, engine: str) -> RowModel | Exclusion:
    """Return what ran, by the publisher's words for the model and its weights, or why that cannot be told."""
    entry = _entries().get(name)
    try:
        model = load_model(name) if entry is None else _model(name)
    except ConfigError as error:
        return Exclusion(reason=f"{error}")
    weights = (entry or {}).get("weights") or weight_dtype.lower()
    kernels = _MARLIN if weights.endswith(_MARLIN) else ""
    weights = weights.removesuffix(kernels)
    bits = 5.33 if weight_dtype == _SIZED else (entry or {}).get("bits")
    if bits is not None:
        fmt = replace(WEIGHT_FORMATS["q4_k_m"], bits_per_weight=bits, head_bits=bits, embedding_bits=bits)
    else:
        try:
            fmt = load_weight_format(_FORMAT_NAMES.get((engine, weights), weights)) if weights else model.native_format
        except ConfigError as error:
            return Exclusion(reason=f"{error}")
    head_bits = (entry or {}).get("head_bits")
    if head_bits is not None:
        fmt = replace(fmt, head_bits=head_bits, embedding_bits=head_bits)
    fmt = replace(fmt, **{name: entry[name] for name in _OF_CHECKPOINT if entry is not None and name in entry})
    if kernels:
        fmt = replace(fmt, name=f"{fmt.name}{kernels}", compute_dtype="bf16")
    return RowModel(model=model, weight_format=fmt, source=(entry or {}).get("source", "by name"))


def reason_for(row: BenchmarkRow, kind: str) -> str:
    """Return why a figure of this row may be far off; empty: no reason is known."""
    for entry in _table()["reason"]:
        for figure in entry["figures"]:
            mine = {"source": row.source, "engine": row.engine, "depth": row.context_depth, "kind": kind}
            if all(mine[key] == value for key, value in figure.items()):
                return str(entry["reason"])
    return ""


def version_of(row: BenchmarkRow, engine: str) -> str:
    """Return which builds of the engine a row is of, empty for the current ones: older kernels have constants of their own."""
    for entry in _table()["version"]:
        if entry["engine"] == engine and row.source in entry["sources"]:
            return str(entry["name"])
    return ""


def is_burst(row: BenchmarkRow) -> bool:
    """Return whether its decode figure is of requests sent at once, from the first token of any to the last of all."""
    once = row.batch > 1 and row.context_depth in (0, row.prompt_tokens) and row.output_tokens is None
    return once and any(row.source in entry["sources"] for entry in _table()["burst"])


def kv_cache_dtype_of(row: BenchmarkRow) -> str:
    """Return the type of a row's KV cache: auto, the model's own, where nobody says anything else."""
    return row.kv_cache_dtype or next(
        (str(entry["dtype"]) for entry in _table()["kv_cache_dtype"] if entry["engine"] == row.engine), "auto"
    )


@cache
def _entries() -> Mapping[str, Mapping[str, Any]]:
    return {name: entry for entry in _table()["model"] for name in entry["names"]}


@cache
def _model(name: str) -> ModelSpec:
    entry = _entries()[name]
    if "model" in entry:
        return load_model(entry["model"])
    title = name.removesuffix(".gguf")
    if "config" in entry:
        return model_from_config(entry["config"], name=title, title=title, source=entry["source"])
    return _from_shape(title, entry["shape"], entry["source"])


def _from_shape(title: str, shape: Mapping[str, Any], source: str) -> ModelSpec:
    """Return a model of a family that is not parsed: parameters, and the layers that keep keys and values."""
    group = LayerGroup(
        kind="full",
        num_layers=shape["attention_layers"],
        num_kv_heads=shape["num_kv_heads"],
        key_dim=shape["head_dim"],
        value_dim=shape["head_dim"],
    )
    return ModelSpec(
        name=title,
        title=title,
        hf_id="",
        source=source,
        layer_groups=(group,),
        max_context=32_768,
        wide_params=0,
        native_format=WEIGHT_FORMATS["bf16"],
        tied_embeddings=shape["tied"],
        **{
            key: shape[key]
            for key in (
                "hidden_size",
                "num_layers",
                "num_attention_heads",
                "vocab_size",
                "params_total",
                "params_active",
                "embedding_params",
                "head_params",
            )
        },
        **{key: shape[key] for key in ("num_experts", "experts_per_token", "expert_params") if key in shape},
    )
