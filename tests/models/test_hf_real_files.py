"""Files of real repositories: each is understood, and agrees with the catalogue and the modules."""

import csv
from pathlib import Path

import pytest

from pagedkv.catalogue import load_model
from pagedkv.model_spec import ModelSpec


def test_all_real_files_are_understood_and_agree_with_the_catalogue(shared_data: Path) -> None:
    files = sorted((shared_data / "hf_configs").glob("*.json"))
    assert len(files) == 16
    for path in files:
        model = load_model(str(path))
        repository = path.name.removesuffix("_config.json").replace("--", "/")
        known = load_model(repository.replace("nvidia/Qwen3.6-35B-A3B-NVFP4", "Qwen/Qwen3.6-35B-A3B"))
        for field in ModelSpec.__dataclass_fields__:
            if field not in ("name", "title", "hf_id", "source", "aliases", "native_format"):
                assert getattr(model, field) == getattr(known, field), (repository, field)
        assert model.name == str(path)
        if not repository.endswith("NVFP4"):
            assert model.native_format == known.native_format


NOT_WITHIN_A_PERCENT = {
    ("deepseek-v3.2", "kv"): "with index keys",
    ("deepseek-v3.2", "active"): "input table and indexers",
    ("deepseek-v3", "active"): "input table",
    ("deepseek-r1", "active"): "input table",
    ("kimi-k2", "active"): "input table",
    ("nemotron-3-nano-30b-a3b", "active"): "input table",
    ("nemotron-3-super-120b-a12b", "active"): "input table",
    ("qwen3.5-35b-a3b", "active"): "nominal",
    ("qwen3.5-122b-a10b", "active"): "nominal",
    ("gemma-4-26b-a4b", "total"): "nominal",
    ("gemma-4-26b-a4b", "active"): "nominal",
    ("llama-4-scout", "total"): "with its vision tower",
    ("llama-4-scout", "active"): "nominal",
    ("mistral-large-2411", "context"): "128k in its model card",
}
"""Where the published table differs: docs/models.md says which figure is right, and why."""


def test_every_row_of_the_published_table_agrees_or_is_explained(shared_data: Path) -> None:
    with (shared_data / "models.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 59
    differing = set()
    for row in rows:
        model = load_model(row["hf_id"])
        kv = model.kv_spec("bf16")
        parts = list(zip(model.layer_groups, kv.group_bytes_per_token, strict=True))
        assert sum(size for group, size in parts if group.window) == int(row["swa_bytes_per_token_bf16_capped"]), model.name
        assert kv.state_bytes_per_sequence == int(row["per_seq_state_bytes"] or 0), model.name
        shape = (model.num_layers, model.hidden_size, model.num_attention_heads, model.vocab_size, int(model.tied_embeddings))
        assert shape == tuple(int(row[column]) for column in ("layers", "hidden", "heads", "vocab", "tied_embeddings")), model.name
        figures = {
            "kv": (sum(size for group, size in parts if not group.window), row["kv_bytes_per_token_bf16"]),
            "total": (model.params_total, row["params_total"]),
            "active": (model.params_active, row["params_active"]),
            "context": (model.max_context, row["max_ctx"]),
        }
        differing |= {
            (model.name, what) for what, (ours, theirs) in figures.items() if abs(ours - int(theirs)) > 0.01 * int(theirs)
        }
    assert differing == set(NOT_WITHIN_A_PERCENT)


@pytest.mark.parametrize(
    ("name", "total", "experts"),
    [
        ("llama-2-7b", 6_738_415_616, 0),
        ("llama-3.1-405b", 405_853_388_800, 0),
        ("llama-4-maverick", 400_711_848_960, 386_547_056_640),
        ("llama-4-scout", 107_769_861_120, 96_636_764_160),
        ("mistral-nemo-12b", 12_247_782_400, 0),
        ("mixtral-8x22b", 140_620_634_112, 135_291_469_824),
        ("qwen2.5-0.5b", 494_032_768, 0),
        ("qwen3-0.6b", 596_049_920, 0),
        ("qwen3-235b-a22b", 235_093_634_560, 227_096_395_776),
        ("qwen3-next-80b-a3b", 79_674_391_296, 77_309_411_328),
        ("qwen3.5-27b", 26_895_998_464, 0),
        ("qwen3.5-397b-a17b", 396_346_350_336, 386_547_056_640),
        ("gemma-2-9b", 9_241_705_984, 0),
        ("gemma-3-1b", 999_885_952, 0),
        ("gemma-3-27b", 27_009_002_240, 0),
        ("gemma-4-26b-a4b", 25_233_141_760, 22_837_985_280),
        ("gemma-4-31b", 30_697_345_280, 0),
        ("gemma-4-e4b", 7_463_013_376, 0),
        ("gpt-oss-120b", 116_829_156_672, 114_701_598_720),
        ("phi-4-mini", 3_836_021_760, 0),
        ("opt-66b", 65_719_701_504, 0),
        ("deepseek-v3", 671_026_404_352, 653_908_770_816),
        ("deepseek-v3.2", 671_877_929_216, 653_908_770_816),
        ("deepseek-v4-flash", 284_332_230_231, 277_025_390_592),
        ("deepseek-v4-pro", 1_572_997_179_491, 1_547_396_186_112),
        ("kimi-k2", 1_026_408_209_408, 1_014_686_023_680),
        ("glm-4.5-air", 106_852_245_504, 99_656_663_040),
        ("glm-4.7-flash", 29_943_390_976, 27_783_069_696),
        ("glm-5", 743_911_199_232, 724_775_731_200),
        ("glm-5.3", 743_377_000_704, 724_775_731_200),
        ("minimax-m2.7", 228_689_748_992, 224_680_476_672),
        ("nemotron-3-nano-30b-a3b", 31_577_937_344, 29_374_808_064),
        ("nemotron-3-ultra-550b-a55b", 549_308_968_960, 515_396_075_520),
    ],
)
def test_parameters_are_those_of_the_modules(name: str, total: int, experts: int) -> None:
    """Source: parameters of the language model's modules in transformers 5.24, built from the same config.json."""
    model = load_model(name)
    assert (model.params_total, model.expert_params) == (total, experts)


def test_searched_blocks_have_their_own_heads_and_widths() -> None:
    model = load_model("nvidia/Llama-3_3-Nemotron-Super-49B-v1")
    assert model.params_total == pytest.approx(49.87e9, rel=1e-3)
    assert [(g.num_layers, g.num_kv_heads) for g in model.layer_groups] == [(49, 8)]


def test_layers_are_told_apart() -> None:
    flash = {(g.kind, g.num_layers, g.compression, g.index_topk) for g in load_model("deepseek-v4-flash").layer_groups}
    assert flash == {("sliding_window", 43, 1, None), ("full", 21, 4, 512), ("full", 20, 128, None)}
    glm = [(g.num_layers, g.index_key_dim, g.index_topk) for g in load_model("glm-5.3").layer_groups]
    assert glm == [(21, 128, 2048), (57, 0, 2048)], "three of four layers take the selection of another"
    assert [(g.kind, g.num_layers, g.window) for g in load_model("llama-4-scout").layer_groups] == [
        ("full", 12, None),
        ("chunked", 36, 8192),
    ]
    assert [(g.num_layers, g.num_sharing_layers) for g in load_model("gemma-4-e4b").layer_groups] == [(4, 3), (20, 15)]
