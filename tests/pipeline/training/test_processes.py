import datetime

import pytest
import torch
import torch.distributed as dist

from pipeline.training import processes
from pipeline.training.processes import LostError, disagreement, others
from tests.tiny import free_port

SAME = {"torch": "2.13.0", "preset": {"batch": 8, "lr": {"start": 0.1}}}


def test_ranks_that_have_the_same_do_not_differ():
    assert disagreement([SAME] * 3) == ""


def test_what_differs_is_named_with_the_ranks_that_have_it():
    other = {"torch": "2.12.1", "preset": {"batch": 8, "lr": {"start": 0.2}}}
    assert disagreement([SAME, SAME, other, SAME, SAME]) == (
        "the ranks differ: torch is 2.13.0 on ranks 0-1, 3-4, 2.12.1 on rank 2; "
        "preset.lr.start is 0.1 on ranks 0-1, 3-4, 0.2 on rank 2. "
        "Give all nodes the same packages, the same checkout and the same command line"
    )


def test_what_one_rank_alone_has_differs():
    assert "; ds_config.bf16 is not there on rank 0, True on rank 1." in disagreement(
        [SAME | {"torch": "1"}, SAME | {"torch": "2", "ds_config": {"bf16": True}}]
    )


def test_of_many_differences_the_first_five_are_told():
    one, two = ({f"name-{i}": value for i in range(9)} for value in (1, 2))
    sentence = disagreement([one, two])
    assert sentence.count("name-") == 5
    assert "name-4 is 1 on rank 0, 2 on rank 1; and 4 more. Give" in sentence


def test_a_rank_that_does_not_come_is_a_sentence(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(processes, "SECONDS_TO_SPEAK", 0)
    with (
        pytest.raises(LostError, match=r"^rank 3 has lost another rank \(.+\), which may have"),
        others(),
    ):
        # of two, the other never comes
        dist.TCPStore(
            "127.0.0.1", free_port(), 2, is_master=True, timeout=datetime.timedelta(seconds=1)
        )


def test_a_bug_of_ours_is_not_taken_for_a_lost_rank():
    with pytest.raises(RuntimeError, match="must match the size"), others():
        torch.ones(2) + torch.ones(3)
