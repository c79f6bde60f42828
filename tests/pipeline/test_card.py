import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from data_prep.train_tokenizer import NORMALIZER, train
from pipeline import card, slices
from pipeline.config import FsqConfig
from pipeline.console import InputError, command
from pipeline.data.schema import SCHEMA_VERSION, fingerprint_of
from pipeline.data.tokenizer import save_tokenizer
from pipeline.files import write_json
from pipeline.models.dalle import save_dalle
from pipeline.models.dvae import DiscreteVAE, save_dvae
from pipeline.weights import save_weights
from tests.pipeline.generation.helpers import random_dalle, random_dvae, tiny_config

CAPTIONS = ["a red circle beside a blue star", "two green cats", "a house under a yellow moon"]
FILTERS = {"boilerplate": True, "english": True, "min_words": 2, "words": ["a", "b", "c"]}


def write_set(folder, kind, rows, val_rows, made_of):
    shards = [{"name": "shard-00000.arrow", "rows": rows, "val_rows": val_rows, "bytes": 9,
               "sha256": f"{rows:064x}"}]  # fmt: skip
    print_ = fingerprint_of(shards)
    content = {"schema_version": SCHEMA_VERSION, "kind": kind, "rows": rows, "shards": shards}
    folder.mkdir()
    write_json(folder / "manifest.json", content | {"fingerprint": print_, "made_of": made_of})
    return print_


def write_events(folder, **figures):
    lines = [{"kind": "val", "step": 777, "time_s": 1.0, **figures}]
    lines.append({"kind": "speed", "step": 777, "seconds_an_update": 0.125, "time_s": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_checkpoint(folder, kind, made_of):
    identity = made_of | {"preset": {"batch": 24, "lr": {"start": 0.5}, "model": {"n_layer": 99}}}
    path = slices.folder_of(folder, 777)
    path.mkdir(parents=True)
    meta = {"kind": kind, "updates": 777, "world": 3, "files": {}, "identity": identity}
    slices.write_meta(path, meta)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a run leaves behind, its weights random."""
    root = tmp_path_factory.mktemp("finished")
    pairs = write_set(
        root / "pairs", "pairs", 4321, 321,
        {"sources": ["/home/somebody/cats", "s3://bucket/dogs|birds/"], "filters": FILTERS,
         "duplicates": "pair", "near_duplicates": "report", "bytes": "inline"},
    )  # fmt: skip
    ledger = {"rows_in": 4500, "rows_out": 4321, "rejects": {"too dark": 100, "no caption": 79}}
    near = {"pictures": 11, "rows": 4242}
    write_json(root / "pairs" / "rejects.json", ledger | {"near_duplicates": near})
    facts = save_tokenizer(
        root / "dalle" / "tokenizer", train(iter(CAPTIONS), 300), 300, NORMALIZER, {"captions": 3}
    )
    config = tiny_config(n_text=8, n_text_vocab=facts.n_vocab)
    of_pairs = {"pairs": [pairs]}
    dvae = save_dvae(root / "dvae", random_dvae(config), of_pairs)
    save_dvae(root / "other_dvae", random_dvae(config, seed=1), of_pairs)
    tokens = write_set(
        root / "tokens", "tokens", 4321, 321, {"dvae": dvae, "pairs": pairs, "val_fraction": 0.07}
    )
    made_of = {"dvae": dvae, "tokenizer": facts.fingerprint, "tokens": [tokens]}
    save_dalle(
        root / "dalle", random_dalle(config).state_dict(), config, made_of | {"updates": 777}
    )
    write_checkpoint(root / "dalle", "dalle", made_of)
    write_checkpoint(root / "dvae", "dvae", of_pairs)
    write_events(root / "dalle", loss=1.5, text=3.25, image=1.125)
    write_events(root / "dvae", psnr_db=19.5)
    losses = {"dalle": {"val": {"step": 777, "loss": 1.5, "text": 3.25, "image": 1.125}},
              "dvae": {"val": {"step": 777, "psnr_db": 19.5}}}  # fmt: skip
    accuracy = {"accuracy_by_set": {"seen": {"n": 64, "colour": 0.90625}, "free": None}}
    write_json(root / "report.json", {"losses": losses, **accuracy})
    return root


def flags(root, out, *more, sets=("tokens", "pairs", "report")):
    given = {"dalle": "dalle", "dvae": "dvae", "tokens": "tokens", "pairs": "pairs",
             "report": "report.json"}  # fmt: skip
    names = ["dalle", "dvae", *sets]
    paths = [str(flag) for name in names for flag in (f"--{name}", root / given[name])]
    return [*paths, "--out", str(out), *map(str, more)]


def written(root, out, *more, **kwargs):
    card.main(flags(root, out, *more, **kwargs))
    return out.read_text(encoding="utf-8")


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def test_the_card_says_what_the_records_say(finished, tmp_path):
    text = written(finished, tmp_path / "card.md")
    weights = load_file(finished / "dalle" / "model.safetensors")
    fingerprint = slices.sha256(finished / "dalle" / "model.safetensors")[:16]
    for line in (
        f"# Model card: Daikon {fingerprint}",
        f"| parameters | {sum(value.numel() for value in weights.values()):,} |",
        "| pictures | 32 x 32 pixels |",
        "| updates | 777 |",
        "| trained on captions | 3 |",
        "- Length of captions: 7 tokens are read",
        "captions taken for another language than English were left out of training.",
        "| 321 of 4,321 rows, drawn by key or picture at a share of 0.07 |",
        "| sources | cats, dogs\\|birds |",
        "| filter: min words | 2 |",
        "| filter: listed words | 3 words |",
        "Of 4,500 rows that came in, 4,321 were taken.",
        "| too dark | 100 |\n| no caption | 79 |",
        "4,242 rows have the perceptual hash of another row (11 such pictures); they were kept.",
        "- 4,242 training rows look like another one.",
        "The image tokenizer was trained on the same pictures.",
        "| batch | 24 |\n| lr.start | 0.5 |\n| ranks, at the last checkpoint | 3 |",
        "| seconds_an_update (last) | 0.125 |",
        "Stage 2, validation after update 777:",
        "| image | 1.125 |",
        "| psnr_db | 19.5 |",
        "| samples, seen | 64 | 90.6 % |",
        "arXiv:2102.12092",
    ):
        assert line in text, line
    assert "/home" not in text
    assert str(finished) not in text
    assert "n_layer" not in text


HEADINGS = (
    "Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data",
    "Quantitative analyses", "Ethical considerations", "Caveats and recommendations",
)  # fmt: skip


def test_what_is_not_on_record_is_said_and_not_invented(copy, tmp_path):
    for model in ("dalle", "dvae"):
        shutil.rmtree(copy / model / "checkpoints")
        (copy / model / "metrics.jsonl").unlink()
    text = written(copy, tmp_path / "card.md", sets=())
    # the order of Mitchell et al.
    at = [text.index(f"## {heading}\n") for heading in HEADINGS]
    assert at == sorted(at)
    assert text.count("The recipe is in no record") == 2
    assert "No record: `--tokens` was not given." in text
    assert "No record: `--pairs` was not given. The model was trained on token sets" in text
    assert "Stage 1: no validation is on record." in text
    assert "Caption accuracy: no record (`--report` was not given)." in text
    assert "Language: not on record" in text
    assert "4,321" not in text
    assert "777" in text.split("## Intended use")[0]
    assert "777" not in text.split("## Intended use")[1]


def test_sets_that_were_mixed_and_rankers_are_described(copy, tmp_path):
    path = copy / "dalle" / "model.json"
    described = json.loads(path.read_text())
    made_of = described["made_of"] | {"weights": [3.0, 1.0]}
    made_of["tokens"].append("f" * 64)
    config = {"width": 12}
    weights = {"a": torch.zeros(2)}
    clip = save_weights(copy / "clip", "clip", config, weights, {})
    shutil.rmtree(copy / "dalle" / "checkpoints")
    save_weights(
        copy / "dalle", "dalle", described["config"],
        load_file(copy / "dalle" / "model.safetensors"), made_of,
    )  # fmt: skip
    text = written(copy, tmp_path / "card.md", "--clip", copy / "clip")
    assert "The sets were mixed in the ratio 3, 1." in text
    assert "Trained on 2 sets of tokens; 1 of pairs are described here." in text
    assert f"| fingerprint of the weights | {clip} |\n| width | 12 |" in text


def test_a_codebook_that_is_not_learnt_is_named(copy, tmp_path):
    model = DiscreteVAE(FsqConfig(32, levels=(4, 3, 2), n_hid=8, n_init=8, n_blk_per_group=1))
    dvae = save_dvae(copy / "dvae", model, {})
    path = copy / "dalle" / "model.json"
    described = json.loads(path.read_text())
    shutil.rmtree(copy / "dalle" / "checkpoints")
    shutil.rmtree(copy / "dvae" / "checkpoints")
    save_weights(
        copy / "dalle", "dalle", described["config"],
        load_file(copy / "dalle" / "model.safetensors"), described["made_of"] | {"dvae": dvae},
    )  # fmt: skip
    text = written(copy, tmp_path / "card.md", sets=())
    assert "| kind | finite scalar quantisation |" in text
    assert "| levels | 4, 3, 2 |" in text
    assert "image tokenizer was trained" not in text


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


def test_folders_that_do_not_belong_together_are_refused(copy, tmp_path):
    out = tmp_path / "card.md"

    def refused(match, *more, **kwargs):
        with pytest.raises(InputError, match=match):
            written(copy, out, *more, **kwargs)
        assert not out.exists()

    refused("was trained on tokens of dVAE .* name the dVAE", "--dvae", copy / "other_dvae")
    refused("add --tokens", sets=("pairs",))
    refused("is a set of pairs, and one of tokens is needed", "--tokens", copy / "pairs")
    refused("holds a dvae, a dalle is needed", "--dalle", copy / "dvae")
    refused("holds a dvae, a clip is needed", "--clip", copy / "dvae")
    refused("model.json cannot be read", "--dvae", copy / "nothing")
    refused("manifest.json cannot be read", "--pairs", copy / "nothing")
    refused("report.json cannot be read", "--report", copy / "nothing" / "report.json")
    (copy / "list.json").write_text("[]")
    refused("is no JSON object", "--report", copy / "list.json")
    (copy / "list.json").write_text("{}")
    refused("has no losses", "--report", copy / "list.json")
    write_set(copy / "more", "tokens", 5, 1, {})
    refused("name the tokens of its training", "--tokens", copy / "more")
    write_set(copy / "others", "pairs", 5, 1, {})
    refused("name the pairs that were encoded", "--pairs", copy / "others")


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("report.json", lambda r: r["losses"]["dvae"]["val"].update(psnr_db=20.0),
         "other losses of stage dvae"),
        ("pairs/rejects.json", lambda r: r["rejects"].update(dark=1),
         "does not account for the 4321 rows"),
        ("dalle/tokenizer/tokenizer.json", lambda r: r.update(fingerprint="0" * 64),
         "do not belong together"),
    ],
)  # fmt: skip
def test_records_that_contradict_each_other_are_refused(copy, tmp_path, file, change, match):
    edit(copy / file, change)
    with pytest.raises(InputError, match=match):
        written(copy, tmp_path / "card.md")


def test_a_checkpoint_of_another_run_is_refused(copy, tmp_path):
    shutil.rmtree(copy / "dalle" / "checkpoints")
    write_checkpoint(copy / "dalle", "dalle", {"tokens": ["0"]})
    with pytest.raises(InputError, match=r"is of another run than .* its tokens"):
        written(copy, tmp_path / "card.md")


def test_the_command_ends_with_a_sentence(finished, tmp_path, capsys):
    argv = flags(finished, tmp_path / "card.md", "--dalle", tmp_path / "none")
    with pytest.raises(SystemExit) as ended:
        command(lambda: card.main(argv))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
