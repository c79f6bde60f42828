import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from pipeline import import_clip
from pipeline.config import ClipConfig, TowerConfig
from pipeline.console import InputError
from pipeline.generation.rerank import ClipScorer
from pipeline.models import clip_import
from pipeline.models.clip import Clip, load_clip
from pipeline.models.clip_import import load_foreign
from tests.pipeline.data.test_clip_tokens import PAIRS, write

CONFIG = ClipConfig(
    image_size=32, patch_size=16, vision=TowerConfig(128, 2, 2), n_text=9,
    n_vocab=512 + len(PAIRS) + 2, text=TowerConfig(64, 1, 1), n_embed=24,
)  # fmt: skip


@pytest.fixture(scope="module")
def state():
    """In the layout and the type of OpenAI's."""
    torch.manual_seed(0)
    tensors = {name: value.half() for name, value in Clip(CONFIG).state_dict().items()}
    return tensors | {"logit_scale": tensors["logit_scale"].view(())}


def run(monkeypatch, tmp_path, weights, *flags):
    vocabulary = write(tmp_path / "pairs.txt.gz")
    words = ["--weights", weights, "--vocabulary", vocabulary, "--out", tmp_path / "clip", *flags]
    monkeypatch.setattr(sys, "argv", ["import_clip", *map(str, words)])
    import_clip.main()
    return tmp_path / "clip"


@pytest.mark.parametrize("kind", ["safetensors", "pt", "checkpoint"])
def test_every_format_gives_the_same_folder(tmp_path, monkeypatch, state, kind):
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pt":
        # as a TorchScript module of OpenAI's gives its state dict
        torch.save(state | {"context_length": torch.tensor(9)}, path)
    else:
        named = {f"module.{name}": value for name, value in state.items()}
        torch.save({"epoch": 3, "name": "mine", "state_dict": named}, path)
    out = run(monkeypatch, tmp_path, path)
    clip, artifact = load_clip(out)
    assert clip.config == CONFIG
    for name, value in clip.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name].float().view(value.shape)), name
    assert artifact.made_of["weights_sha256"] == import_clip.sha256(path)
    assert ClipScorer(out).fingerprint == artifact.fingerprint
    with pytest.raises(InputError, match="holds a model; name a new folder"):
        run(monkeypatch, tmp_path, path)


def test_the_activation_is_that_of_the_flag(tmp_path, monkeypatch, state):
    save_file(state, tmp_path / "weights.safetensors")
    out = run(monkeypatch, tmp_path, tmp_path / "weights.safetensors", "--no-quick-gelu")
    assert not load_clip(out)[0].config.quick_gelu


def test_a_torchscript_archive_is_refused_with_a_way_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"ViT-B-32/{name}", "")
    sentence = "is a TorchScript archive, which holds code .* take .*open_clip_model.safetensors"
    with pytest.raises(InputError, match=sentence):
        load_foreign(tmp_path / "ViT-B-32.pt", quick_gelu=True)


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch, state):
    monkeypatch.chdir(tmp_path)
    torch.save(state | {"x": Evil()}, "evil.pt")
    with pytest.raises(InputError, match="no weights that can be read without running it"):
        load_foreign(tmp_path / "evil.pt", quick_gelu=True)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"visual.proj": None}, r"has no visual\.proj: no CLIP of two transformers"),
        ({"ln_final.bias": None}, r"ln_final\.bias is not there, and \(64,\) in the model"),
        ({"logit_bias": torch.zeros(1)}, r"logit_bias is \(1,\), and not there in the model"),
        ({"visual.proj": torch.zeros(128, 23)}, r"visual\.proj is \(128, 23\), and \(128, 24\)"),
        ({"positional_embedding": torch.zeros(9, 60)}, "60 wide, .* into heads of 64: give --vis"),
        ({"visual.conv1.weight": torch.zeros(128, 3)}, "has shapes that no CLIP has"),
    ],
)  # fmt: skip
def test_weights_of_another_model_are_refused(tmp_path, state, change, sentence):
    tensors = {name: value for name, value in (state | change).items() if value is not None}
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=sentence):
        load_foreign(tmp_path / "weights.safetensors", quick_gelu=True)


@pytest.mark.parametrize(("width", "n_head"), [(768, 12), (1280, 16), (1408, 16), (1664, 16)])
def test_widths_of_known_towers_tell_their_heads(tmp_path, state, width, n_head):
    other = {"visual.conv1.weight": torch.zeros(width, 3, 8, 8), "ln_final.bias": None}
    tensors = {name: value for name, value in (state | other).items() if value is not None}
    found = clip_import._config(tensors, True, None, 32)
    assert found.vision.n_head == n_head
    assert clip_import._config(tensors, True, 128, 32).vision.n_head == width // 128


def test_files_that_are_no_weights_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    (tmp_path / "a.pt").write_bytes(b"nothing")
    (tmp_path / "words.pt").write_text("hello world\n")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "number.pt")
    for name, sentence in {
        "nowhere.pt": "nowhere.pt cannot be read .No such file",
        "nowhere.safetensors": "nowhere.safetensors cannot be read .No such file",
        "a.safetensors": "or is damaged", "a.pt": "or is damaged", "words.pt": "or is damaged",
        "list.pt": "holds a list, no state dict", "number.pt": "holds 'a', which is no tensor",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            load_foreign(tmp_path / name, quick_gelu=True)


def test_a_vocabulary_of_other_weights_leaves_no_folder(tmp_path, monkeypatch, state):
    other = state | {"token_embedding.weight": torch.zeros(600, 64)}
    save_file(other, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="has 21 pairs, the weights have 600 tokens"):
        run(monkeypatch, tmp_path, tmp_path / "weights.safetensors")
    assert not (tmp_path / "clip").exists()
