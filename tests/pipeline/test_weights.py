import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline import weights
from pipeline.console import InputError
from pipeline.slices import sha256
from pipeline.weights import Entry, load_weights, save_weights

TENSORS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([0.5, -0.5])}
MADE_OF = {"pairs": "abc"}


@pytest.fixture
def folder(tmp_path):
    save_weights(tmp_path / "model", "dvae", {"n_in": 3}, TENSORS, MADE_OF)
    return tmp_path / "model"


def describe(folder, **changes):
    """Change the description of a model, as who wrote it would."""
    path = folder / "model.json"
    description = json.loads(path.read_text()) | changes
    del description["crc32"]
    path.write_text(json.dumps(description | {"crc32": weights._crc(description)}))


def test_what_was_saved_is_loaded(folder):
    artifact = load_weights(folder, "dvae")
    assert artifact.config == {"n_in": 3}
    assert artifact.made_of == MADE_OF
    assert artifact.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(artifact.tensors[name], TENSORS[name]) for name in TENSORS)
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors"]


def test_the_fingerprint_is_that_of_the_weights_alone(tmp_path, folder):
    one = load_weights(folder, "dvae").fingerprint
    assert save_weights(tmp_path / "same", "dvae", {"n_in": 4}, TENSORS, {}) == one
    other = TENSORS | {"bias": torch.tensor([0.5, 0.5])}
    assert save_weights(tmp_path / "other", "dvae", {"n_in": 3}, other, MADE_OF) != one
    assert len(one) == 16


def test_weights_fill_a_model(folder):
    model = nn.Linear(3, 2)
    load_weights(folder, "dvae").fill(model)
    assert torch.equal(model.weight, TENSORS["weight"])


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (nn.Linear(4, 2), r"weight is \(2, 3\) in the file and \(2, 4\) in the model; export"),
        (nn.Linear(3, 2, bias=False), r"bias is \(2,\) in the file and None in the model"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, model, sentence):
    with pytest.raises(InputError, match=sentence):
        load_weights(folder, "dvae").fill(model)


def test_a_folder_without_a_model_is_refused(folder):
    (folder / "model.json").unlink()
    sentence = "holds no trained dvae: it needs .*; name the --out of pipeline.train_dvae"
    with pytest.raises(InputError, match=sentence):
        load_weights(folder, "dvae")


def test_weights_that_are_missing_are_a_broken_copy(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot be read \(No such file.*the copy is broken"):
        load_weights(folder, "dvae")


def test_another_kind_is_refused(folder):
    with pytest.raises(InputError, match="holds a dvae, a dalle is needed"):
        load_weights(folder, "dalle")


def test_a_newer_schema_is_refused(folder):
    describe(folder, schema_version=3)
    with pytest.raises(InputError, match="schema version 3, this code reads up to 2; update"):
        load_weights(folder, "dvae")


@pytest.mark.parametrize("old", ['"n_in": 3', '"pairs": "abc"', '"kind": "dvae"', '"crc32"'])
def test_a_description_that_was_changed_is_refused(folder, old):
    path = folder / "model.json"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, old.replace("3", "4").replace("a", "b").replace("c32", "x")))
    with pytest.raises(InputError, match=r"not as it was written \(crc32 differs\); export it"):
        load_weights(folder, "dvae")


@pytest.mark.parametrize(
    "changes", [{"config": None}, {"config": 5}, {"schema_version": True}, {"schema_version": 0}]
)
def test_a_description_of_other_types_is_refused(folder, changes):
    describe(folder, **changes)
    with pytest.raises(InputError, match=r"does not describe a model: .*; export it again"):
        load_weights(folder, "dvae")


def test_the_first_schema_is_read(folder):
    path = folder / "model.json"
    description = json.loads(path.read_text())
    del description["crc32"]
    digest = description.pop("files")["model.safetensors"]
    path.write_text(json.dumps(description | {"schema_version": 1, "sha256": digest}))
    artifact = load_weights(folder, "dvae")
    assert all(torch.equal(artifact.tensors[name], TENSORS[name]) for name in TENSORS)
    assert artifact.fingerprint == digest[:16]


LARGE = {
    "a": torch.randn(7, 5), "b": torch.randn(3).bfloat16(), "c": torch.zeros(0, 4),
    "d": torch.randn(2, 2, 2).half(), "e": torch.randn(()), "f": torch.arange(5),
}  # fmt: skip


@pytest.mark.parametrize(("file_bytes", "n_files"), [(10**9, 1), (150, 2), (1, 6)])
def test_large_models_go_into_several_files_that_other_libraries_read(
    tmp_path, file_bytes, n_files
):
    held = []

    def entry(name):
        def read():
            held.append(name)
            return LARGE[name]

        return Entry(LARGE[name].dtype, tuple(LARGE[name].shape), read)

    save_weights(tmp_path, "dvae", {}, {"old": torch.ones(3)}, {}, file_bytes=1)
    entries = {name: entry(name) for name in LARGE}
    fingerprint = save_weights(tmp_path, "dvae", {"n_in": 3}, entries, MADE_OF, file_bytes)
    assert held == list(LARGE)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == n_files
    theirs = {}
    for path in files:
        theirs |= load_file(path)
    ours = load_weights(tmp_path, "dvae")
    for found in (theirs, ours.tensors):
        assert found.keys() == LARGE.keys()
        for name, value in LARGE.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)
    assert ours.fingerprint == fingerprint
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (n_files > 1)
    if n_files > 1:
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(v.nbytes for v in LARGE.values())
        for name, file in content["weight_map"].items():
            assert name in load_file(tmp_path / file)


def test_a_killed_save_leaves_no_model_that_is_half_of_another(folder):
    def die():
        raise KeyboardInterrupt

    new = TENSORS | {"bias": Entry(torch.float32, (2,), die)}
    with pytest.raises(KeyboardInterrupt):
        save_weights(folder, "dvae", {"n_in": 3}, new, MADE_OF)
    with pytest.raises(InputError, match="holds no trained dvae"):
        load_weights(folder, "dvae")
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "{}", '{"schema_version": 1}'])
def test_a_description_that_is_none_is_refused(folder, content):
    (folder / "model.json").write_text(content)
    with pytest.raises(InputError, match=r"does not describe a model: .*; export it again"):
        load_weights(folder, "dvae")


def test_a_schema_version_that_is_no_number_is_refused(folder):
    describe(folder, schema_version="new")
    with pytest.raises(InputError, match="does not describe a model: schema_version is 'new'"):
        load_weights(folder, "dvae")


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[:-4]
    else:
        data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "one bit"])
def test_damaged_weights_are_refused(folder, how):
    damage(folder / "model.safetensors", how)
    with pytest.raises(InputError, match=r"sha256 differs\): the copy is broken; copy or export"):
        load_weights(folder, "dvae")


def test_a_file_that_is_no_safetensors_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    describe(folder, files={"model.safetensors": sha256(folder / "model.safetensors")})
    with pytest.raises(InputError, match="cannot be read"):
        load_weights(folder, "dvae")


def test_saving_again_replaces_the_model(folder):
    save_weights(folder, "dvae", {"n_in": 3}, {"weight": torch.ones(1)}, {})
    assert load_weights(folder, "dvae").tensors.keys() == {"weight"}


def test_files_of_others_stay(folder):
    others = [folder / name for name in ("model-mine.safetensors", "model2.safetensors")]
    for path in others:
        path.write_bytes(b"mine")
    left = folder / "model-00001-of-00002.safetensors"
    left.write_bytes(b"of a larger one")
    save_weights(folder, "dvae", {"n_in": 3}, TENSORS, MADE_OF)
    assert all(path.read_bytes() == b"mine" for path in others)
    assert not left.exists()


def test_tensors_need_not_be_contiguous(tmp_path):
    save_weights(tmp_path, "dvae", {}, {"weight": TENSORS["weight"].t()}, {})
    assert torch.equal(load_weights(tmp_path, "dvae").tensors["weight"], TENSORS["weight"].t())


@dataclasses.dataclass
class Small:
    n_in: int


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"n_in": 3, "n_out": 2}, "unexpected keyword argument 'n_out'; copy or export"),
        ({}, "missing 1 required"),
    ],
)
def test_a_config_of_other_fields_is_a_sentence(folder, config, sentence):
    assert load_weights(folder, "dvae").config_as(Small) == Small(3)
    describe(folder, config=config)
    with pytest.raises(InputError, match=f"model.json has a config .* cannot read: .*{sentence}"):
        load_weights(folder, "dvae").config_as(Small)
