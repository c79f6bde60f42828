"""OpenAI's pickles: the golden ones were made with the released code (random weights)."""

import contextlib
import importlib
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.config import DvaeConfig
from pipeline.console import InputError
from pipeline.models.dvae import Block, Conv2d, Decoder, DiscreteVAE, Encoder, load_openai
from pipeline.models.released import LEGACY_START, MAX_PICKLE_BYTES, read_released

# copied from the project's golden files: the released format, n_hid 16, vocabulary 512
GOLDEN = Path(__file__).parent / "golden" / "openai_dvae_tiny"
ENCODER, DECODER = GOLDEN / "encoder.pkl", GOLDEN / "decoder.pkl"
REFUSED = r"is not the encoder\.pkl that OpenAI released, or is damaged; nothing in it was run"


@pytest.fixture
def dall_e(tmp_path, monkeypatch):
    """The released package's classes, empty: torch finds their sources and puts them into files."""
    package = tmp_path / "stubs" / "dall_e"
    package.mkdir(parents=True)
    for file, names in {
        "__init__": [],
        "encoder": ["Encoder", "EncoderBlock"],
        "decoder": ["Decoder", "DecoderBlock"],
        "utils": ["Conv2d"],
    }.items():
        classes = "".join(f"class {name}(nn.Module):\n    pass\n\n\n" for name in names)
        (package / f"{file}.py").write_text("from torch import nn\n\n\n" + classes)
    monkeypatch.syspath_prepend(package.parent)
    for name in ("dall_e", "dall_e.encoder", "dall_e.decoder", "dall_e.utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield lambda name: importlib.import_module(f"dall_e.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "dall_e"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def write(tmp_path, dall_e):
    """Writes half a dVAE of ours as the released code would; returns the path and its weights."""

    def write(half, *, old=False, n_blk_per_group=1, change=lambda module: None):
        file, utils = dall_e(half), dall_e("utils")
        theirs = {
            Encoder: "Encoder", Decoder: "Decoder", Block: f"{half.title()}Block",
        }  # fmt: skip
        torch.manual_seed(0)
        config = DvaeConfig(
            image_size=16, n_vocab=5, n_hid=4, n_init=3, n_blk_per_group=n_blk_per_group
        )
        module = getattr(DiscreteVAE(config), half)
        state = {name: value.clone() for name, value in module.state_dict().items()}
        for part in module.modules():
            if type(part) in theirs:
                part.__class__ = getattr(file, theirs[type(part)])
            elif type(part) is Conv2d:
                part.__class__ = utils.Conv2d
                part.compute_dtype = None
        change(module)
        path = tmp_path / f"{half}-{old}-{n_blk_per_group}.pkl"
        torch.save(module, path, _use_new_zipfile_serialization=not old)
        return path, state

    return write


def written(pickled, path, *, old, keys=()):
    """A file of torch.save around the bytes of a pickle."""
    if old:
        start = [pickle.dumps(part, 2) for part in (*LEGACY_START, {"little_endian": True})]
        path.write_bytes(b"".join(start) + pickled + pickle.dumps(list(keys), 2))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
    return path


def rezipped(path, out, compress=(), **changes):
    """A copy of a zip file, ``changes`` made to the members that end so."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            last = name.partition("/")[2]
            change = changes.get(last.replace("/", "_").replace(".", "_"), lambda data: data)
            how = zipfile.ZIP_DEFLATED if last in compress else zipfile.ZIP_STORED
            target.writestr(name, change(source.read(name)), how)
    return out


# ---- the weights


@pytest.mark.parametrize("old", [True, False], ids=["legacy", "zip"])
def test_outputs_are_those_of_the_released_code(tmp_path, dall_e, old):
    encoder, decoder = ENCODER, DECODER
    if old:
        for name in ("encoder", "decoder", "utils"):
            dall_e(name)
        encoder, decoder = tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"
        for source, target in ((ENCODER, encoder), (DECODER, decoder)):
            module = torch.load(source, weights_only=False)
            torch.save(module, target, _use_new_zipfile_serialization=False)
            assert not zipfile.is_zipfile(target)
            assert b"class Conv2d(nn.Module)" in target.read_bytes()
    expected = load_file(GOLDEN / "expected.safetensors")
    dvae = load_openai(encoder, decoder, image_size=64)
    assert not dvae.training
    assert not any(p.requires_grad for p in dvae.parameters())
    logits = dvae.logits(expected["image"][:1])
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=5e-6)
    codes = dvae.encode(expected["image"])
    assert torch.equal(codes, expected["codes"])
    torch.testing.assert_close(dvae.decode(codes), expected["reconstruction"], rtol=0, atol=1e-6)


def of_another_torch(module):
    """Attributes that are not ours to know, and some of today's left out."""
    for part in module.modules():
        part.unheard_of = {"of": [1, "later torch", 2**70, (None, 0.5)]}
        for name in ("_non_persistent_buffers_set", "_is_full_backward_hook", "training"):
            part.__dict__.pop(name)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("old", [True, False], ids=["legacy", "zip"])
def test_files_of_other_versions_are_read(write, old, protocol, monkeypatch):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *a, **k: save(*a, **k, pickle_protocol=protocol))
    (encoder, encoder_state), (decoder, decoder_state) = (
        write(half, old=old, change=of_another_torch) for half in ("encoder", "decoder")
    )
    dvae = load_openai(encoder, decoder, image_size=16)
    for module, state in ((dvae.encoder, encoder_state), (dvae.decoder, decoder_state)):
        assert module.state_dict().keys() == state.keys()
        for name, value in module.state_dict().items():
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("old", [True, False], ids=["legacy", "zip"])
def test_weights_in_16_bit_and_out_of_order_are_read(write, old):
    def change(module):
        module.half()
        for part in module.modules():
            if hasattr(part, "w"):
                part.w = nn.Parameter(part.w.data.transpose(0, 1).contiguous().transpose(0, 1))

    path, state = write("encoder", old=old, change=change)
    dvae = load_openai(path, write("decoder")[0], image_size=16)
    for name, value in dvae.encoder.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name].half().float()), name


# ---- code


class Calls:
    """A call, where it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def make_it(proof):
    """What a file may try to do, each leaving ``proof`` behind; in numpy's case a class of its."""
    import_os = Calls(eval, "__import__('os')")
    return {
        "mkdir": Calls(os.mkdir, proof),
        "system": Calls(os.system, f"mkdir '{proof}'"),
        "eval": Calls(eval, f"__import__('os').mkdir({proof!r})"),
        "exec": Calls(exec, f"__import__('os').mkdir({proof!r})"),
        "getattr": Calls(map, Calls(getattr, import_os, "mkdir"), [proof]),
        "numpy": np.zeros(3),
    }


def nested(how, evil):
    """Places in a file where a call may stand."""
    if how == "key":
        # arrays are no keys
        return {Calls(np.dtype, "f4") if isinstance(evil, np.ndarray) else evil: 1}
    return {
        "top": evil,
        "list in a dict": {"w": [1, (evil,)]},
        "state": Calls(torch._utils._rebuild_parameter, torch.zeros(1), evil, {}),
    }[how]


EVILS = ("mkdir", "system", "eval", "exec", "getattr", "numpy")


@pytest.mark.parametrize("how", ["top", "list in a dict", "key", "state", "attribute", "no torch"])
@pytest.mark.parametrize("old", [True, False], ids=["legacy", "zip"])
@pytest.mark.parametrize("kind", EVILS)
def test_code_in_a_file_is_not_run(tmp_path, write, kind, old, how):
    path, proof = tmp_path / "encoder.pkl", tmp_path / "it ran"
    evil = make_it(str(proof))[kind]
    if how == "no torch":
        path.write_bytes(pickle.dumps(evil, 2 if old else 5))
    elif how == "attribute":
        made, _ = write("encoder", old=old, change=lambda module: setattr(module, "evil", evil))
        made.replace(path)
    else:
        torch.save(nested(how, evil), path, _use_new_zipfile_serialization=not old)
    with pytest.raises(InputError, match=REFUSED) as refused:
        read_released(path, "Encoder")
    assert "\n" not in str(refused.value)
    assert not proof.exists()


@pytest.mark.parametrize("kind", [kind for kind in EVILS if kind != "numpy"])
def test_those_files_do_run_where_they_are_trusted(tmp_path, kind):
    proof = tmp_path / "it ran"
    made = pickle.loads(pickle.dumps(make_it(str(proof))[kind]))
    if kind == "getattr":
        list(made)
    assert proof.exists()


@pytest.mark.parametrize("old", [True, False], ids=["legacy", "zip"])
@pytest.mark.parametrize(
    ("instructions", "reason"),
    [
        (b"(S'x'\nios\nsystem\n.", "torch writes no STRING"),
        (b"(Vx\nios\nsystem\n.", "torch writes no UNICODE"),
        (b"(ios\nsystem\n.", "torch writes no INST"),
        (b"\x80\x02(cos\nsystem\no.", "it names 'os.system'"),
        (b"\x80\x02(ctorch\ndevice\no.", "torch writes no OBJ"),
        (b"\x80\x04ctorch\ndevice\n)}\x92.", "torch writes no NEWOBJ_EX"),
        (b"\x80\x02\x82\x01.", "torch writes no EXT1"),
        (b"Pos\n.", "torch writes no PERSID"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "it names 'os.system'"),
        (b"\x80\x04\x8c\x05torch\x8c\x05nn.os\x93.", "it names 'torch.nn.os'"),
        # names of the lists, out of place
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "it calls what is no function"),
        (b"\x80\x02ctorch.nn.modules.linear\nIdentity\n}b.", "a Name stands where a module"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "takes 0 positional arguments but 1"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR.", "a tensor in it has no values"),
        (b"\x80\x02(U\x07storagecos\nsystem\ntQ.", "torch writes no SHORT_BINSTRING"),
        (b"\x80\x02(X\x07\0\0\0storageX\x02\0\0\0os\x85tQ.", "neither weights nor a class"),
        # keys whose hash would exhaust the stack, and what is not there
        (b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.", "a dict in it has a tuple for a key"),
        (b"\x80\x02}(]Nu.", "a dict in it has a list for a key"),
        (b"\x80\x02}(NNNu.", "argument"),
        (b"\x80\x02h\x07.", "7"),
        (b"\x80\x02\x86.", "take what is not there"),
        (b"\x80\x02t.", "pop from empty list"),
        (b"\x80\x02.", "pop from empty list"),
        (b"\x80\x02Nb.", "a NoneType stands where a dict should"),
        (b"\x80\x02K", ""),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", ""),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", ""),
        (b"\x80\x02\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7fr\xff\xff\xff\x7fK\x01h\x00.", "0"),
        (b"\x80\x02N" + b"\x85" * 2 * MAX_PICKLE_BYTES + b".", ""),
    ],
)
def test_hostile_instructions_are_refused(tmp_path, instructions, reason, old):
    path = written(instructions, tmp_path / "encoder.pkl", old=old)
    with pytest.raises(InputError, match=REFUSED) as refused:
        read_released(path, "Encoder")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


class Graph(pickle.Pickler):
    """Writes pickles with storages, as torch does."""

    def persistent_id(self, value):
        return value.id if isinstance(value, Stored) else None


class Stored:
    def __init__(self, kind, key, n, *view):
        self.id = ("storage", kind, key, "cpu", n, *view)


def pickled_module(dall_e, tmp_path, **attributes):
    """The bytes of an Encoder with the given attributes."""
    module = dall_e("encoder").Encoder.__new__(dall_e("encoder").Encoder)
    module.__dict__.update(attributes)
    file = tmp_path / "module"
    with file.open("wb") as target:
        Graph(target, 2).dump(module)
    return file.read_bytes()


def tensor(storage, size, stride, offset=0):
    return Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})


@pytest.mark.parametrize("old", [True, False], ids=["legacy", "zip"])
@pytest.mark.parametrize(
    ("n", "size", "stride", "offset", "reason"),
    [
        (2**40, (1,), (1,), 0, "it claims 4,398,046,511,104 bytes of weights and has"),
        (2**90, (1,), (1,), 0, "bytes of weights and has"),
        (-1, (1,), (1,), 0, "neither weights nor a class"),
        (9, (2**40,), (0,), 0, "its tensors are more than its weights"),
        (9, (5, 2), (0, 1), 0, "its tensors are more than its weights"),
        (9, (2**70,), (0,), 0, ""),
        (9, (3, 3), (3, 1), 1, ""),
        (9, (3,), (-1,), 8, ""),
        (9, (3,), (1,), -1, ""),
        (9, ("3",), (1,), 0, ""),
        (9, 3, None, None, ""),
        (10, (9,), (1,), 0, ""),
        (8, (8,), (1,), 0, ""),
    ],
)
def test_claims_are_held_against_what_is_there(
    tmp_path, dall_e, n, size, stride, offset, reason, old
):
    """Nine values are there."""
    stored = Stored(torch.FloatStorage, "0", n)
    parameters = {"w": tensor(stored, size, stride, offset)}
    module = pickled_module(dall_e, tmp_path, _parameters=parameters)
    path, values = tmp_path / "encoder.pkl", np.arange(9, dtype="<f4").tobytes()
    written(module, path, old=old, keys=["0"])
    if old:
        path.write_bytes(path.read_bytes() + (9).to_bytes(8, "little") + values)
    else:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("archive/data/0", values)
    with pytest.raises(InputError, match=REFUSED) as refused:
        read_released(path, "Encoder")
    assert reason in str(refused.value)


@pytest.mark.parametrize("keys", [[], ["0", "1"], ["1"], [["0"]], ["0", "0"]])
def test_a_list_of_other_weights_is_refused(tmp_path, dall_e, keys):
    stored = Stored(torch.FloatStorage, "0", 1)
    module = pickled_module(dall_e, tmp_path, _parameters={"w": tensor(stored, (1,), (1,))})
    path = written(module, tmp_path / "encoder.pkl", old=True, keys=keys)
    with path.open("ab") as file:
        file.write(2 * ((1).to_bytes(8, "little") + bytes(4)))
    with pytest.raises(InputError, match="it lists other weights than it names"):
        read_released(path, "Encoder")


def test_one_storage_of_two_kinds_is_refused(tmp_path, dall_e):
    kinds = torch.FloatStorage, torch.HalfStorage
    both = {str(k): tensor(Stored(k, "0", 2), (2,), (1,)) for k in kinds}
    module = pickled_module(dall_e, tmp_path, _parameters=both)
    with pytest.raises(InputError, match="neither weights nor a class"):
        read_released(written(module, tmp_path / "encoder.pkl", old=False), "Encoder")


def test_a_module_inside_itself_is_refused(write):
    for old in (True, False):
        path, _ = write(
            "encoder", old=old, change=lambda m: m._modules.update(again=m._modules["blocks"])
        )
        with pytest.raises(InputError, match="a module stands in two places"):
            read_released(path, "Encoder")


# ---- damage


@pytest.mark.parametrize("old", [True, False], ids=["legacy", "zip"])
def test_a_file_cut_anywhere_is_refused(tmp_path, write, old):
    data = write("encoder", old=old)[0].read_bytes()
    read_released(write("encoder", old=old)[0], "Encoder")
    # the head, where the pickles of the older format begin, byte by byte; then all over the file
    cuts = {
        *range(120),
        *range(120, len(data), len(data) // 100),
        *range(len(data) - 25, len(data)),
    }
    path = tmp_path / "encoder.pkl"
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match=REFUSED) as refused:
            read_released(path, "Encoder")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("old", [True, False], ids=["legacy", "zip"])
def test_a_flipped_byte_is_a_sentence_or_a_weight(tmp_path, write, old):
    data = write("encoder", old=old)[0].read_bytes()
    path, refused = tmp_path / "encoder.pkl", 0
    rng = np.random.default_rng(0)
    places = {*range(100), *rng.integers(0, len(data), 100), *range(len(data) - 25, len(data))}
    for place in sorted(places):
        broken = bytearray(data)
        broken[place] ^= int(rng.integers(1, 256))
        path.write_bytes(broken)
        # any other exception fails the test
        with contextlib.suppress(InputError):
            read_released(path, "Encoder")
            refused -= 1
        refused += 1
    assert refused > 80


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"compress": ["data/0"]}, r"'[\w-]+/data/0' is compressed"),
        ({"compress": ["data.pkl"]}, r"data\.pkl' is compressed"),
        ({"data_0": lambda data: data + b"0000"}, r"data/0' takes 2,356 bytes, at most 2,352 are"),
        ({"data_0": lambda data: data[4:]}, r"2,348 of 2,352 bytes of weights are there"),
        ({"data_pkl": lambda data: data + bytes(MAX_PICKLE_BYTES)}, "bytes, at most 262,144 are"),
        ({"byteorder": lambda data: b"big"}, "its numbers are big-endian"),
    ],
)
def test_members_that_are_not_torchs_are_refused(tmp_path, write, changes, reason):
    source, _ = write("encoder")
    path = rezipped(source, tmp_path / "encoder.pkl", **changes)
    with pytest.raises(InputError, match=REFUSED + r" \(.*" + reason):
        read_released(path, "Encoder")


@pytest.mark.parametrize("names", [[], ["a/data.pkl", "b/data.pkl"]])
def test_a_zip_file_with_another_number_of_pickles_is_refused(tmp_path, names):
    path = tmp_path / "encoder.pkl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("first", *names):
            archive.writestr(name, pickle.dumps(1))
    with pytest.raises(InputError, match=rf"\(it has {len(names)} data\.pkl\)"):
        read_released(path, "Encoder")


def test_a_member_that_would_unfold_is_not_unfolded(tmp_path):
    path = tmp_path / "encoder.pkl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000_000))
    assert path.stat().st_size < 200_000
    # 100 MB would show
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(InputError, match="is compressed"):
        read_released(path, "Encoder")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (b"", REFUSED),
        (b"hello", REFUSED),
        (b"PK\x03\x04", REFUSED),
        (pickle.dumps([1, 2]), REFUSED + r" \(.*"),
        (DECODER.read_bytes(), "holds a Decoder, and a dall_e Encoder is needed"),
    ],
    ids=["empty", "text", "zip", "pickle", "decoder"],
)
def test_another_file_is_named(tmp_path, broken, sentence):
    path = tmp_path / "encoder.pkl"
    path.write_bytes(broken)
    with pytest.raises(InputError, match=sentence):
        load_openai(path, DECODER)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.pkl cannot be read .*; name the decoder\.pkl"):
        load_openai(ENCODER, tmp_path / "nowhere.pkl")
    with pytest.raises(InputError, match="name the decoder"):
        load_openai(ENCODER, tmp_path)


# ---- halves that do not fit


def test_halves_of_two_models_are_refused(write):
    with pytest.raises(InputError, match=r"has shape .*, and beside .*encoder\.pkl it must have"):
        load_openai(ENCODER, write("decoder")[0])
    shallow, deep = write("encoder")[0], write("decoder", n_blk_per_group=2)[0]
    with pytest.raises(InputError, match=r"block_2\..* and beside .* it must have None; name the"):
        load_openai(shallow, deep)


def test_tensors_that_do_not_follow_from_the_sizes_are_refused(write):
    def widen(module):
        module.blocks.input.w = nn.Parameter(torch.zeros(4, 3, 5, 5))

    path, _ = write("encoder", change=widen)
    with pytest.raises(InputError, match=r"has shape \(4, 3, 5, 5\), and .* have \(4, 3, 7"):
        load_openai(path, write("decoder")[0], image_size=16)


def test_a_module_without_the_released_layers_is_refused(write):
    path, _ = write("encoder", change=lambda module: module.blocks.input._parameters.clear())
    with pytest.raises(InputError, match=r"has no weights blocks\.input\.w; take the file"):
        load_openai(path, write("decoder")[0], image_size=16)
