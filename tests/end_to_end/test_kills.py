"""Jobs that are killed and started again leave what an undisturbed job leaves."""

import pytest

from tests.end_to_end import kills


@pytest.mark.dist
@pytest.mark.slow
def test_ingest_and_encode_survive_kills(tmp_path):
    kills.make_source(tmp_path / "source")
    kills.make_dvae(tmp_path / "dvae")
    (tmp_path / "pairs").mkdir()
    calm, killed, hit = kills.survive(
        lambda out: kills.ingest(tmp_path / "source", out), tmp_path / "pairs", kills=4, seed=1
    )
    assert hit > 0
    assert len([name for name in calm if name.endswith(".arrow")]) == 5
    assert killed == calm
    (tmp_path / "tokens").mkdir()
    pairs = tmp_path / "pairs" / "calm"
    calm, killed, hit = kills.survive(
        lambda out: kills.encode(pairs, tmp_path / "dvae", out), tmp_path / "tokens", 3, seed=2
    )
    assert hit > 0
    assert killed == calm
