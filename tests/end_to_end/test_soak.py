"""A run that is killed and started again ends as one that never was."""

import pytest

from tests.end_to_end import soak


@pytest.mark.dist
@pytest.mark.slow
def test_training_survives_kills_bit_for_bit(tiny, tmp_path, one_cpu_thread):
    calm, killed, kinds = soak.survive(tiny, tmp_path, 3, kills=3, steps=40, seed=3)
    assert len(set(kinds)) == 3
    assert soak.differences(calm, killed) == []
