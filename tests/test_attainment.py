"""A share of requests that met their goals is written so that it shows whether it is the wanted one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.sims.attainment import share_words


def test_a_share_shows_on_which_side_of_the_wanted_one_it_is() -> None:
    assert [share_words(share, 0.99) for share in (0.98, 0.9896, 0.98996, 0.99, 0.9904, None)] == [
        *("98.0%", "98.96%", "98.996%", "99.0%", "99.0%", "–")
    ]
    assert share_words(1 / 3, None) == "33.3%"


@given(share=st.floats(0, 1), attain=st.floats(0.01, 1))
def test_no_share_below_the_wanted_one_reads_as_if_it_reached_it(share: float, attain: float) -> None:
    text = share_words(share, attain)
    assert float(text.removesuffix("%")) / 100 == pytest.approx(share, abs=0.00051)
    if share < attain - 1e-8:
        assert float(text.removesuffix("%")) / 100 < attain
