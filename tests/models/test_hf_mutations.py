"""Mutated files give a model or a reason."""

import copy
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_configs import LATENT, LLAMA, MIXTURE, WINDOWED, parse

from pagedkv.catalogue import load_model
from pagedkv.errors import ConfigError
from pagedkv.model_spec import ModelSpec

SHIPPED = {"llama": LLAMA, "mixture": MIXTURE, "latent": LATENT, "windowed": WINDOWED}


def real_configs(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


JUNK: tuple[Callable[[random.Random], object], ...] = (
    lambda rng: None,
    lambda rng: rng.choice([0, -1, -(10**9), 10**9, 2**63, 10**60]),
    lambda rng: rng.choice([0.0, -0.5, 2.5, 1e308, math.inf, math.nan]),
    lambda rng: rng.choice([True, False]),
    lambda rng: rng.choice(["", "x", "full_attention", "fp8", "∞" * 500, "bfloat16"]),
    lambda rng: rng.choice([[], [[]], [None], [1] * 70, ["full_attention"] * 4, [{}], [-1]]),
    lambda rng: rng.choice([{}, {"x": {"y": []}}, {"weights": 4}, {"quant_method": "awq", "bits": 4}]),
    lambda rng: rng.randint(1, 300),
)
NEW_KEYS = ("sliding_window", "kv_lora_rank", "index_topk", "layer_types", "num_experts", "text_config", "block_configs")


def mutate(node: Any, rng: random.Random) -> None:
    """Change one place somewhere in a tree of objects and lists."""
    while True:
        inner = [value for value in (node.values() if isinstance(node, dict) else node) if isinstance(value, dict | list) and value]
        if not inner or rng.random() < 0.6:
            break
        node = rng.choice(inner)
    if isinstance(node, list):
        place: Any = rng.randrange(len(node))
        change = rng.choice(["junk", "drop", "repeat"])
        if change == "repeat":
            node.append(node[place])
            return
    else:
        place = rng.choice([*node, rng.choice(NEW_KEYS)])
        change = rng.choice(["junk", "junk", "drop", "swap", "rename"]) if place in node else "junk"
    if change == "junk":
        node[place] = rng.choice(JUNK)(rng)
    elif change == "drop":
        del node[place]
    elif change == "swap":
        other = rng.choice(list(node))
        node[place], node[other] = node[other], node[place]
    else:
        node[f"{place}_{rng.randrange(10)}"] = node.pop(place)


def check_sane(model: ModelSpec) -> None:
    kv = model.kv_spec("auto")
    positive = (
        model.num_layers,
        model.params_total,
        model.params_active,
        model.flops_per_token,
        model.weight_bytes(model.native_format),
        kv.sequence_bytes(1000),
        kv.bytes_read(1000),
        model.max_context,
    )
    assert all(math.isfinite(figure) and figure > 0 for figure in positive), positive
    assert math.isfinite(model.attention_flops_per_pair)
    assert 0 < model.params_active <= model.params_total
    assert model.linear_params >= 0
    assert kv.block_bytes(16) >= kv.bytes_per_token >= 0
    assert 0 < model.native_format.bits_per_weight <= 32


@pytest.fixture(scope="module")
def fuzz_configs() -> list[dict[str, Any]]:
    """The real files where they lie beside the checkout; small ones of four kinds otherwise."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "hf_configs"
    return [*SHIPPED.values(), *real_configs(folder).values()]


def outcome(attempt: Callable[[], ModelSpec]) -> str | None:
    """Return why there is no model, None if there is a sane one; any other error fails the test."""
    try:
        check_sane(attempt())
    except ConfigError as error:
        return str(error)
    return None


def test_ten_thousand_mutated_files_give_a_model_or_a_reason(fuzz_configs: list[dict[str, Any]]) -> None:
    reasons = []
    for seed in range(10_000):
        rng = random.Random(seed)
        config = copy.deepcopy(fuzz_configs[seed % len(fuzz_configs)])
        for _ in range(rng.randint(1, 3)):
            if config:
                mutate(config, rng)
        reasons.append(outcome(lambda config=config: parse(config)))  # type: ignore[misc]
    refused = [reason for reason in reasons if reason is not None]
    assert all(reason.startswith("m, config.json") and len(reason) < 1500 for reason in refused)
    assert 2000 < len(refused) < 9000, "mutations neither always break a file nor never do"


def test_mutated_bytes_give_a_model_or_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    texts = [json.dumps(config).encode() for config in SHIPPED.values()]
    for seed in range(600):
        rng = random.Random(seed)
        text = bytearray(texts[seed % len(texts)])
        for _ in range(rng.randint(1, 3)):
            text[rng.randrange(len(text))] = rng.choice(b'0-9.{}[]",:\x00\xff enu')
        path.write_bytes(text[: rng.choice([len(text), rng.randrange(len(text))])])
        assert str(path) in (outcome(lambda: load_model(str(path))) or str(path))
