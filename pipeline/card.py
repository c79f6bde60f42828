"""A model card, written from what the run left on record.

python -m pipeline.card --dalle DIR --dvae DIR --tokens DIR --pairs DIR --report FILE --out CARD.md

Headings follow Mitchell et al. 2019, "Model Cards for Model Reporting" (arXiv 1810.03993). Every
number stands in a record: model.json, checkpoints, metrics.jsonl, manifests, rejects.json,
report.json. Where a record is missing, the card says so; models and sets that do not
belong together are refused (a ranker may be anybody's).
"""

import argparse
from collections.abc import Iterable
from typing import Any

from pipeline.console import a_path, command, logger, printable
from pipeline.evaluation.metrics import last
from pipeline.evaluation.records import ModelRecord, Records, SetRecord, read_records
from pipeline.files import write_bytes

log = logger("card")

CITATION = """```
@inproceedings{ramesh2021zero,
  title     = {Zero-Shot Text-to-Image Generation},
  author    = {Aditya Ramesh and Mikhail Pavlov and Gabriel Goh and Scott Gray and Chelsea Voss and
               Alec Radford and Mark Chen and Ilya Sutskever},
  booktitle = {International Conference on Machine Learning},
  year      = {2021},
  note      = {arXiv:2102.12092}
}
```"""


def _value(value: Any) -> str:
    """A value of a record as a cell of a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    return printable(str(value)).replace("|", "\\|").replace("<", "&lt;")


def _table(rows: Iterable[tuple[str, Any]], head: tuple[str, str] = ("", "")) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_value(name)} | {_value(value)} |" for name, value in rows)])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _plain(name: str) -> str:
    """The last part of the name of a source: where it lay is nobody's business."""
    return name.rstrip("/").rpartition("/")[2]


def write_card(records: Records) -> str:
    """The card as Markdown."""
    dalle = records.dalle
    sections = {
        "Model details": _details(records),
        "Intended use": _use(records),
        "Factors": _factors(records),
        "Metrics": METRICS,
        "Evaluation data": _evaluation_data(records),
        "Training data": _training_data(records),
        "Training procedure": _procedure(records),
        "Quantitative analyses": _analyses(records),
        "Ethical considerations": _ethics(records),
        "Provenance of pictures": PROVENANCE,
        "Caveats and recommendations": _caveats(records),
        "Citation": CITATION,
    }
    first = (
        f"# Model card: Daikon {dalle.fingerprint}\n\n"
        "Written by `pipeline.card`: every figure of the run is from a record that the run left."
    )
    return "\n\n".join([first, *(f"## {name}\n\n{text}" for name, text in sections.items())]) + "\n"


def _details(records: Records) -> str:
    dalle, dvae, tokenizer = records.dalle, records.dvae, records.tokenizer
    config = dalle.config
    side = dvae.config["image_size"]
    stage_2 = [
        ("fingerprint of the weights", dalle.fingerprint),
        ("parameters", dalle.parameters),
        ("layers, width, heads", [config["n_layer"], config["d_model"], config["n_head"]]),
        ("text positions", config["n_text"]),
        ("image tokens", f"{config['grid']} x {config['grid']}"),
        ("vocabularies, text and image", [config["n_text_vocab"], config["n_image_vocab"]]),
        ("updates", dalle.made_of.get("updates", "not on record")),
    ]
    kind = (
        "finite scalar quantisation" if "levels" in dvae.config else "discrete VAE, Gumbel-softmax"
    )
    stage_1 = [
        ("fingerprint of the weights", dvae.fingerprint),
        ("kind", kind),
        ("parameters", dvae.parameters),
        ("pictures", f"{side} x {side} pixels"),
        *((name, dvae.config[name]) for name in ("n_vocab", "levels") if name in dvae.config),
    ]
    if "encoder_sha256" in dvae.made_of:
        stage_1.append(("origin", "the released files of OpenAI, imported"))
    words = [
        ("fingerprint", tokenizer["fingerprint"][:16]),
        ("pieces", tokenizer["n_vocab"]),
        ("normalisation", tokenizer.get("normalizer")),
        ("trained on captions", (tokenizer.get("trainer") or {}).get("captions")),
    ]
    parts = [
        "A transformer that continues the tokens of a caption with the tokens of a picture, and an "
        "image tokenizer that turns these into pixels, after Ramesh et al. 2021.",
        "Transformer (stage 2):",
        _table(stage_2),
        "Image tokenizer (stage 1):",
        _table(stage_1),
        "Text tokenizer (byte-pair encoding with a fallback to bytes):",
        _table(words),
    ]
    if records.clip is not None:
        ranker = [("fingerprint of the weights", records.clip["fingerprint"])]
        parts += ["Ranker of samples (CLIP):", _table([*ranker, *records.clip["config"].items()])]
    parts.append(
        "Who trained it and when, and under which licence the weights may be used, is in no record."
    )
    return "\n\n".join(parts)


def _use(records: Records) -> str:
    side = records.dvae.config["image_size"]
    return (
        f"Research on, and demonstrations of, drawing pictures of {side} x {side} pixels from "
        "captions like those it was trained on. Not for pictures that are taken for photographs "
        "of real people, places or events, and not for any decision about people: nothing in the "
        "records measures how it does there."
    )


def _factors(records: Records) -> str:
    config = records.dalle.config
    lines = [
        f"- Length of captions: {config['n_text'] - 1} tokens are read, the rest is cut off.",
        "- Language: " + _language(records.pairs),
        "- Who and what the pictures show, and how often, was not recorded; so no figure below is "
        "told apart by groups of people or by topics.",
    ]
    return "\n".join(lines)


def _language(pairs: list[SetRecord]) -> str:
    if not pairs:
        return "not on record (`--pairs` was not given)."
    english = [(one.manifest["made_of"].get("filters") or {}).get("english") for one in pairs]
    if all(english):
        return "captions taken for another language than English were left out of training."
    return "captions of any language were trained on; which, and how many of each, is not recorded."


METRICS = (
    "Losses are in nats a token, means over the validation rows: `text`, `image`, and `loss`, "
    "their weighted sum. The image tokenizer has the peak signal-to-noise ratio of "
    "reconstructions (`psnr_db`), how many codes are in use (`codes_used`) and the perplexity of "
    "their distribution. Caption accuracy, where it was measured, is the share of pictures in "
    "which a checker without any learning reads what the caption says, word by word."
)


def _evaluation_data(records: Records) -> str:
    if not records.tokens:
        return "No record: `--tokens` was not given."
    rows = []
    for one in records.tokens:
        share = _value(one.manifest["made_of"].get("val_fraction"))
        kept = f"{_value(one.val_rows)} of {_value(one.manifest['rows'])} rows"
        name = f"set {one.manifest['fingerprint'][:16]}"
        rows.append((name, f"{kept}, drawn by key or picture at a share of {share}"))
    return (
        "Rows of the training sets that were kept apart before training:\n\n"
        + _table(rows)
        + "\n\nThey come from the same sources as the training data, so the figures say nothing "
        "about captions and pictures of another kind."
    )


def _training_data(records: Records) -> str:
    if not records.pairs:
        known = ", ".join(p[:16] for p in records.dalle.made_of.get("tokens") or [])
        where = f" The model was trained on token sets {known}." if known else ""
        return f"No record: `--pairs` was not given.{where}"
    parts = [_pair_set(one) for one in records.pairs]
    n_known, n_named = len(records.dalle.made_of.get("tokens") or []), len(records.pairs)
    if n_named < n_known:
        parts.append(f"Trained on {n_known} sets of tokens; {n_named} of pairs are described here.")
    described = {one.manifest["fingerprint"] for one in records.pairs}
    if weights := records.dalle.made_of.get("weights"):
        parts.append(f"The sets were mixed in the ratio {_value(weights)}.")
    stage_1 = records.dvae.made_of.get("pairs")
    if stage_1 is None:
        parts.append("On which pictures the image tokenizer was trained is not on record.")
    elif set(stage_1) <= described:
        parts.append("The image tokenizer was trained on the same pictures.")
    else:
        parts.append("The image tokenizer was trained on other pictures, which are not described.")
    return "\n\n".join(parts)


def _pair_set(record: SetRecord) -> str:
    manifest, ledger = record.manifest, record.ledger
    made_of = manifest["made_of"]
    rows = [
        ("fingerprint", manifest["fingerprint"][:16]),
        ("sources", [_plain(str(source)) for source in made_of.get("sources", [])]),
        ("captioned pictures", manifest["rows"]),
        ("of them for validation", record.val_rows),
        ("exact duplicates", f"one kept of each {_value(made_of.get('duplicates'))}"),
        ("pictures kept out by perceptual hash", "yes" if made_of.get("excluded") else "none"),
        ("judged by a function of the user's", "yes" if made_of.get("score") else "no"),
    ]
    filters = made_of.get("filters") or {}
    if filters:
        words = filters.get("words") or []
        rows += [
            (f"filter: {name.replace('_', ' ')}", value)
            for name, value in sorted(filters.items())
            if name != "words"
        ]
        rows.append(("filter: listed words", f"{len(words):,} words" if words else "no list"))
    parts = [_table(rows)]
    if not ledger:
        return "\n\n".join([*parts, "What was left out is in no record beside this set."])
    near = ledger.get("near_duplicates") or {}
    parts.append(
        f"Of {_value(ledger['rows_in'])} rows that came in, {_value(ledger['rows_out'])} were "
        "taken. Left out:"
    )
    rejects = sorted(ledger["rejects"].items(), key=lambda item: -item[1])
    parts.append(_table(rejects, ("reason", "rows")) if rejects else "Nothing.")
    if ledger.get("notes"):
        parts.append("Taken, with a note:")
        parts.append(_table(sorted(ledger["notes"].items()), ("note", "rows")))
    if near:
        handling = "left out" if made_of.get("near_duplicates") == "drop" else "kept"
        parts.append(
            f"{_value(near.get('rows'))} rows have the perceptual hash of another row "
            f"({_value(near.get('pictures'))} such pictures); they were {handling}."
        )
    return "\n\n".join(parts)


def _procedure(records: Records) -> str:
    parts = []
    for title, record in (
        ("Stage 2, the transformer", records.dalle),
        ("Stage 1, the image tokenizer", records.dvae),
    ):
        parts.append(f"{title}:\n\n{_recipe(record)}")
    parts.append("On which hardware is in no record.")
    return "\n\n".join(parts)


def _recipe(record: ModelRecord) -> str:
    rows = []
    for name, value in record.recipe.items():
        if name == "model":
            continue
        inside = value if isinstance(value, dict) else None
        rows += [(f"{name}.{k}", v) for k, v in inside.items()] if inside else [(name, value)]
    if record.ranks is not None:
        rows.append(("ranks, at the last checkpoint", record.ranks))
    for kind in ("speed", "machine"):
        figures = last(record.events, kind)
        rows += [(f"{name} (last)", value) for name, value in figures.items() if name != "step"]
    if not record.recipe:
        lost = "The recipe is in no record: no checkpoint that can be read lies beside the model."
        return f"{lost}\n\n{_table(rows)}" if rows else lost
    return _table(rows)


def _analyses(records: Records) -> str:
    parts = []
    for title, record in (("Stage 2", records.dalle), ("Stage 1", records.dvae)):
        figures = record.validation
        if figures:
            said = [(name, value) for name, value in figures.items() if name != "step"]
            table = _table(said, ("figure", "value"))
            parts.append(f"{title}, validation after update {_value(figures['step'])}:\n\n{table}")
        else:
            parts.append(f"{title}: no validation is on record.")
    report = records.report
    if report is None:
        return "\n\n".join([*parts, "Caption accuracy: no record (`--report` was not given)."])
    sets = {
        **{f"samples, {name}": v for name, v in (report.get("accuracy_by_set") or {}).items()},
        "reconstructions": report.get("reconstruction_accuracy"),
        "true pictures": report.get("render_accuracy"),
    }
    found = {name: value for name, value in sets.items() if value}
    if not found:
        return "\n\n".join([*parts, "Caption accuracy: the captions are none the checker reads."])
    words = [word for word in next(iter(found.values())) if word != "n"]
    lines = [f"| pictures | n | {' | '.join(words)} |", "|---|---|" + "---|" * len(words)]
    for name, shares in found.items():
        cells = [_percent(shares[word]) if word in shares else "" for word in words]
        lines.append(f"| {_value(name)} | {_value(shares['n'])} | {' | '.join(cells)} |")
    return "\n\n".join([*parts, "Caption accuracy:", "\n".join(lines)])


def _ethics(records: Records) -> str:
    lines = [
        "- What is trained in comes out. The filters are those listed under training data; none of "
        "them looks for violence, nudity, hate, private people or works under copyright.",
        "- How much it repeats of its training pictures (memorisation) was not measured.",
        "- Bias, of what is drawn for captions that name people or work or places, was not "
        "measured.",
    ]
    kept = sum(
        (one.ledger.get("near_duplicates") or {}).get("rows", 0)
        for one in records.pairs
        if one.manifest["made_of"].get("near_duplicates") != "drop"
    )
    if kept:
        lines.insert(
            2,
            f"- {_value(kept)} training rows look like another one. Models repeat such pictures "
            "most readily.",
        )
    return "\n".join(lines)


PROVENANCE = (
    "`pipeline.sample` writes PNG files that carry caption, seed, settings and fingerprints of the "
    "models as text, and can put a visible signature over the lower right corner and an invisible "
    "mark into the pixels. `python -m pipeline.sample verify FILE` reads text and mark. Saving a "
    "picture in another format drops the text. The mark lives through JPEG of good quality and "
    "through cropping, not through scaling, turning or strong compression; its pattern is public, "
    "so that it can be removed, and put on pictures that were not drawn here. None of the three "
    "proves anything against somebody who wants to deceive; a picture without them may still have "
    "been drawn by this model."
)


def _caveats(records: Records) -> str:
    side = records.dvae.config["image_size"]
    lines = [
        f"- Pictures have {side} x {side} pixels; enlarging them adds no detail.",
        "- Words that the training captions do not have give arbitrary pictures.",
        "- Before the model is given to others: look at samples of many captions, also of unwanted "
        "ones; search the nearest training pictures of some samples; and write down licence, "
        "hardware and contact, which no record has.",
    ]
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="pipeline.card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dalle", required=True, type=a_path, help="--out of pipeline.train_dalle")
    parser.add_argument("--dvae", required=True, type=a_path, help="the dVAE that made its tokens")
    parser.add_argument("--tokens", nargs="+", default=[], type=a_path, help="that it trained on")
    parser.add_argument("--pairs", nargs="+", default=[], type=a_path, help="that were encoded")
    parser.add_argument("--report", type=a_path, help="report.json of pipeline.report")
    parser.add_argument("--clip", type=a_path, help="the model that ranks its samples")
    parser.add_argument("--out", required=True, type=a_path, help="the card, a Markdown file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write a model card from the command line."""
    args = parse(argv)
    records = read_records(
        args.dalle, args.dvae,
        tokens=args.tokens, pairs=args.pairs, report=args.report, clip=args.clip,
    )  # fmt: skip
    write_bytes(args.out, write_card(records).encode())
    log.info("wrote %s", args.out)


if __name__ == "__main__":
    command(main)
