from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.errors import ConfigError, TraceFormatError
from pagedkv.sims.derive_lengths import main, spearman
from pagedkv.sims.length_names import length_names, load_lengths
from pagedkv.sims.lengths import FileLengths, FixedLengths, LengthDistribution, QuantileLengths
from pagedkv.sims.restricted_lengths import restricted
from pagedkv.sims.traces import read_lengths

FILES = {"azure-conv": "azure_conv_2023.csv.gz", "sharegpt": "sharegpt_lengths.csv.gz"}
DECILES = np.arange(0.1, 0.95, 0.1)


def draw(distribution: LengthDistribution, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    prompt, output = distribution.sample(np.random.default_rng(seed), n)
    assert prompt.shape == output.shape == (n,)
    assert prompt.dtype == output.dtype == np.int64
    if n:
        assert min(prompt.min(), output.min()) >= 1
        assert (prompt + output).max() <= distribution.max_total
    return prompt, output


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Kolmogorov's: the largest difference between the two shares of values up to x, over all x."""
    at = np.union1d(first, second)
    shares = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


@pytest.fixture
def rows(tmp_path: Path) -> FileLengths:
    path = tmp_path / "rows.csv"
    path.write_text("input_len,output_len\n10,1\n20,2\n30,3\n400,40\n")
    return FileLengths.read(path)


@pytest.mark.parametrize("name", FILES)
def test_tables_describe_their_file(name: str, shared_data: Path) -> None:
    distribution = load_lengths(name)
    assert isinstance(distribution, QuantileLengths)
    true = read_lengths(shared_data / FILES[name])
    drawn = draw(distribution, 400_000)
    means = (distribution.mean_prompt, distribution.mean_output)
    tables = (distribution.prompt_quantiles, distribution.output_quantiles)
    for mean, table, of_true, of_drawn in zip(means, tables, true, drawn, strict=True):
        deciles = np.interp(DECILES, distribution.probabilities, table)
        assert deciles == pytest.approx(np.quantile(of_true, DECILES), rel=0.02, abs=1)
        assert mean == pytest.approx(of_true.mean(), rel=0.01)
        # Four standard errors of 400,000 draws; ShareGPT has one prompt of 241,402 tokens.
        assert of_drawn.mean() == pytest.approx(mean, abs=4 * of_drawn.std() / 400_000**0.5)
        assert distance(of_drawn, of_true) < 0.01
        assert of_true.min() <= of_drawn.min() <= of_drawn.max() <= of_true.max()
    assert spearman(*drawn) == pytest.approx(spearman(*true), abs=0.03)


@pytest.mark.parametrize("name", FILES)
def test_tables_keep_which_prompts_have_which_outputs(name: str, shared_data: Path) -> None:
    true, drawn = read_lengths(shared_data / FILES[name]), draw(load_lengths(name), 400_000)
    edges = np.quantile(true[0], DECILES)
    means = [[output[np.searchsorted(edges, prompt) == decile].mean() for decile in range(10)] for prompt, output in (true, drawn)]
    # A Gaussian copula with the right rank correlation is off by a factor of 3 in the last decile of the Azure trace.
    assert means[1] == pytest.approx(means[0], rel=0.06)
    assert distance(drawn[0] + drawn[1], true[0] + true[1]) < 0.03


@pytest.mark.parametrize("name", FILES)
def test_the_script_prints_the_shipped_table(name: str, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distribution = load_lengths(name)
    assert isinstance(distribution, QuantileLengths)
    main([str(shared_data / FILES[name]), "--name", name, "--source", distribution.source])
    shipped = Path(__file__).parents[1] / "sims" / "lengths.toml"
    assert capsys.readouterr().out in shipped.read_text()


@pytest.mark.parametrize("name", FILES)
def test_tables_are_well_formed(name: str) -> None:
    table = load_lengths(name)
    assert isinstance(table, QuantileLengths)
    assert table.source
    assert (table.probabilities[0], table.probabilities[-1]) == (0, 1)
    assert (np.diff(table.probabilities) > 0).all()
    for quantiles in (table.prompt_quantiles, table.output_quantiles):
        assert quantiles.shape == table.probabilities.shape
        assert quantiles[0] >= 1
        assert (np.diff(quantiles) >= 0).all()
    # Margins that are not even would bend both lengths' own distributions.
    for axis in (0, 1):
        margin = table.joint_ranks.sum(axis=axis)
        assert margin.max() - margin.min() <= 1


def test_pairs_of_bins_that_never_occur_are_never_drawn() -> None:
    line = np.array([1.0, 101.0])
    opposed = QuantileLengths(
        name="opposed",
        source="made up",
        probabilities=np.array([0.0, 1.0]),
        prompt_quantiles=line,
        output_quantiles=line,
        joint_ranks=np.array([[0, 1], [1, 0]]),
    )
    prompt, output = draw(opposed, 1000)
    assert ((prompt - 51) * (output - 51) <= 0).all()
    assert opposed.max_total == 51 + 101
    assert opposed.mean_prompt == 51


def test_spearman_is_the_correlation_of_mean_ranks() -> None:
    x, y = np.array([3, 1, 2, 2]), np.array([7, 5, 5, 9])
    assert spearman(x, y) == pytest.approx(np.corrcoef([4, 1, 2.5, 2.5], [3, 1.5, 1.5, 4])[0, 1])
    assert spearman(x, x**3) == pytest.approx(1)


@given(
    prompt=st.integers(1, 5000),
    output=st.integers(1, 5000),
    ratio=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 9),
)
def test_fixed_lengths_stay_in_their_range(prompt: int, output: int, ratio: float, seed: int) -> None:
    lengths = FixedLengths(input_len=prompt, output_len=output, range_ratio=ratio)
    for drawn, centre in zip(draw(lengths, 50, seed), (prompt, output), strict=True):
        assert (drawn >= max(1, np.floor(centre * (1 - ratio)))).all()
        assert (drawn <= np.ceil(centre * (1 + ratio))).all()
        assert ratio > 0 or (drawn == centre).all()


def test_fixed_lengths_reach_both_ends_evenly() -> None:
    lengths = FixedLengths(input_len=10, output_len=4, range_ratio=0.5)
    prompt, output = draw(lengths, 20_000)
    assert np.unique(prompt).tolist() == list(range(5, 16))
    assert np.unique(output, return_counts=True)[1] / 20_000 == pytest.approx([0.2] * 5, abs=0.02)
    assert (lengths.mean_prompt, lengths.mean_output, lengths.max_total) == (10, 4, 21)
    assert abs(spearman(prompt, output)) < 0.03


@pytest.mark.parametrize("settings", [(0, 1, 0.0), (1, 0, 0.0), (1, 1, 1.0), (1, 1, -0.1), (1, 1, float("nan"))])
def test_fixed_lengths_that_cannot_be(settings: tuple[int, int, float]) -> None:
    with pytest.raises(ConfigError, match=r"at least 1 token|outside \[0, 1\)"):
        FixedLengths(input_len=settings[0], output_len=settings[1], range_ratio=settings[2])


def test_rows_of_a_file_stay_together(rows: FileLengths) -> None:
    prompt, output = draw(rows, 4000)
    assert (prompt == 10 * output).all()
    assert np.unique(prompt, return_counts=True)[1] / 4000 == pytest.approx([0.25] * 4, abs=0.03)
    assert (rows.mean_prompt, rows.mean_output, rows.max_total) == (115, 11.5, 440)


@pytest.mark.parametrize("name", [*FILES, "fixed", "file"])
def test_same_seed_same_lengths(name: str, rows: FileLengths) -> None:
    made: dict[str, LengthDistribution] = {
        "fixed": FixedLengths(input_len=100, output_len=50, range_ratio=0.3),
        "file": rows,
    }
    whole = made.get(name) or load_lengths(name)
    for distribution in (whole, restricted(whole, 130)):
        assert np.array_equal(draw(distribution, 300), draw(distribution, 300))
        assert not np.array_equal(draw(distribution, 300), draw(distribution, 300, seed=1))
        assert [x.size for x in draw(distribution, 0)] == [0, 0]


def test_a_restriction_is_the_conditional_distribution() -> None:
    table = load_lengths("azure-conv")
    short = restricted(table, 1024)
    prompt, output = draw(short, 100_000)
    assert short.max_total == 1024
    free_prompt, free_output = draw(table, 400_000, seed=5)
    fits = free_prompt + free_output <= 1024
    assert distance(prompt, free_prompt[fits]) < 0.01
    assert distance(output, free_output[fits]) < 0.01
    assert (prompt.mean(), output.mean()) == pytest.approx((short.mean_prompt, short.mean_output), rel=0.01)
    assert spearman(prompt, output) == pytest.approx(spearman(free_prompt[fits], free_output[fits]), abs=0.02)
    assert restricted(table, table.max_total) is table


def test_restricted_draws_reach_the_limit() -> None:
    prompt, output = draw(restricted(FixedLengths(input_len=3, output_len=3, range_ratio=0.5), 4), 3000)
    pairs, counts = np.unique(np.stack([prompt, output]), axis=1, return_counts=True)
    assert pairs.T.tolist() == [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [3, 1]]
    assert counts / 3000 == pytest.approx([1 / 6] * 6, abs=0.03)


def test_a_restricted_file_loses_its_long_rows(rows: FileLengths) -> None:
    short = restricted(rows, 33)
    assert (short.max_total, short.mean_prompt, short.mean_output) == (33, 20, 2)
    assert np.unique(draw(short, 500)[0]).tolist() == [10, 20, 30]
    assert restricted(rows, 440) is rows


def test_restrictions_that_leave_nothing_say_what_would_fit(rows: FileLengths) -> None:
    with pytest.raises(ConfigError, match=r"at most 10 tokens .* the shortest has 11"):
        restricted(rows, 10)
    with pytest.raises(ConfigError, match=r"at most 149 tokens .* one in a hundred has at most 150"):
        restricted(FixedLengths(input_len=100, output_len=50), 149)
    with pytest.raises(ConfigError, match="fewer than one request in a thousand of 'azure-conv'") as error:
        restricted(load_lengths("azure-conv"), 10)
    enough = int(str(error.value).rsplit(maxsplit=1)[1])
    assert draw(restricted(load_lengths("azure-conv"), enough), 1000)[0].size == 1000


def test_names_and_paths(tmp_path: Path, shared_data: Path) -> None:
    assert length_names() == tuple(sorted(FILES))
    from_file = load_lengths(str(shared_data / FILES["sharegpt"]))
    assert isinstance(from_file, FileLengths)
    assert from_file.max_total == 241_420
    with pytest.raises(ConfigError, match=r"unknown length distribution 'azureconv': did you mean azure-conv\?.* path"):
        load_lengths("azureconv")
    with pytest.raises(TraceFormatError, match="cannot be read"):
        load_lengths(str(tmp_path / "absent.csv"))
    with pytest.raises(TraceFormatError, match="cannot be read"):
        load_lengths("absent.csv")
