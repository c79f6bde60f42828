"""Run as ``python -m`` this module with RANK PORT FILE it is one of two ranks."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from pipeline.config import ClipConfig, TowerConfig
from pipeline.models.clip import Clip
from pipeline.training.contrastive import contrastive_share
from tests.tiny import ROOT, free_port

SMALL = ClipConfig(
    image_size=16, patch_size=8, vision=TowerConfig(16, 2, 2), n_text=6, n_vocab=20,
    text=TowerConfig(16, 2, 2), n_embed=8, quick_gelu=False,
)  # fmt: skip
BATCH = 6


def batch():
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 3, 16, 16, generator=draw)
    texts = torch.randint(0, 19, (BATCH, 6), generator=draw)
    texts[:, -1] = SMALL.end_of_text
    return images, texts


def gradients(part: slice) -> dict[str, torch.Tensor]:
    """Of the loss of this process' part, and the share itself."""
    torch.manual_seed(0)
    model = Clip(SMALL)
    images, texts = batch()
    share, n_right = contrastive_share(*model(images[part], texts[part]))
    share.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return found | {"share": share.detach(), "right": n_right.float()}


def plain_loss(model, images, texts):
    """The paper's figure 3, in float64."""
    image, text, scale = (x.double() for x in model(images, texts))
    logits = scale * image @ text.T
    own = torch.arange(len(images))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def test_one_rank_has_the_loss_of_figure_3():
    torch.manual_seed(0)
    model = Clip(SMALL)
    loss = plain_loss(model, *batch())
    loss.backward()
    found = gradients(slice(None))
    torch.testing.assert_close(found["share"].double(), loss.detach(), rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).norm() <= 1e-5 * max(p.grad.norm(), 1e-3), name


@pytest.mark.dist
def test_two_ranks_have_the_loss_and_the_gradients_of_one(tmp_path):
    port = str(free_port())
    module = [sys.executable, "-m", "tests.pipeline.training.test_contrastive"]
    ranks = [
        subprocess.Popen([*module, str(rank), port, str(tmp_path / str(rank))], cwd=ROOT)
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    one, other = (load_file(tmp_path / str(rank)) for rank in range(2))
    whole = gradients(slice(None))
    assert whole["logit_scale"].abs() > 1e-3
    for name, value in whole.items():
        added = one[name] + other[name]
        assert (added - value).norm() <= 1e-5 * max(value.norm(), 1e-3), name


if __name__ == "__main__":
    rank, port, file = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    n = BATCH // 2
    found = gradients(slice(rank * n, (rank + 1) * n))
    save_file({name: value.contiguous().clone() for name, value in found.items()}, file)
    dist.barrier()
    dist.destroy_process_group()
