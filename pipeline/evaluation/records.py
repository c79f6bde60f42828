"""What a run from pictures to pictures left on record, read again and held against each other."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import slices
from pipeline.config import DalleConfig, DvaeConfig, FsqConfig, as_dict, require
from pipeline.console import InputError
from pipeline.data.schema import read_manifest
from pipeline.data.tokenizer import Tokenizer
from pipeline.evaluation.metrics import Events, last, read_metrics
from pipeline.models.dalle import Dalle
from pipeline.models.dvae import DiscreteVAE
from pipeline.weights import describe_folder, fingerprint_of

Facts = dict[str, Any]


@dataclass(frozen=True)
class ModelRecord:
    """A folder of weights and what lies beside them; what is not there is empty."""

    folder: Path
    config: Facts
    made_of: Facts
    fingerprint: str
    parameters: int
    events: Events  # of metrics.jsonl
    recipe: Facts  # the preset, from the newest checkpoint
    ranks: int | None  # that wrote this checkpoint

    @property
    def validation(self) -> dict[str, float]:
        """Figures of the last validation."""
        return last(self.events, "val")


@dataclass(frozen=True)
class SetRecord:
    """A shard set: its manifest, and of pairs what ingest took and left out."""

    manifest: Facts
    ledger: Facts

    @property
    def val_rows(self) -> int:
        """Rows that are kept for validation."""
        return sum(shard["val_rows"] for shard in self.manifest["shards"])


@dataclass(frozen=True)
class Records:
    """Everything that a model card is written from; what was not named is empty or None."""

    dalle: ModelRecord
    dvae: ModelRecord
    tokenizer: Facts
    tokens: list[SetRecord]
    pairs: list[SetRecord]
    report: Facts | None
    clip: Facts | None


def read_records(
    dalle: Path,
    dvae: Path,
    *,
    tokens: list[Path],
    pairs: list[Path],
    report: Path | None,
    clip: Path | None,
) -> Records:
    """Read the records of folders that belong together.

    Raises:
        InputError: one is missing, damaged or of another run.
    """
    model, codes = _dalle(dalle), _dvae(dvae)
    require(
        model.made_of.get("dvae") == codes.fingerprint,
        f"{dalle} was trained on tokens of dVAE {model.made_of.get('dvae')}, and {dvae} is "
        f"{codes.fingerprint}: name the dVAE that made the tokens",
    )
    tokenizer = Tokenizer(dalle / "tokenizer")
    require(
        model.made_of.get("tokenizer") == tokenizer.fingerprint,
        f"{dalle} was trained with tokenizer {model.made_of.get('tokenizer')}, and the one in it "
        f"is {tokenizer.fingerprint}: put the tokenizer of the training there",
    )
    token_sets = [_tokens(folder, model, codes) for folder in tokens]
    made_from = {record.manifest["made_of"].get("pairs") for record in token_sets}
    if pairs and not tokens:
        raise InputError(
            "--pairs alone cannot be held against the model, which knows its tokens: add --tokens"
        )
    return Records(
        model,
        codes,
        tokenizer.facts,
        token_sets,
        [_pairs(folder, made_from) for folder in pairs],
        None if report is None else _report(report, model, codes),
        None if clip is None else _clip(clip),
    )


def _dalle(folder: Path) -> ModelRecord:
    found, made_of, files = describe_folder(folder, "dalle")
    config = _config(folder, DalleConfig, found)
    with torch.device("meta"):
        model = Dalle(config)
    return _model(folder, as_dict(config), made_of, files, model)


def _dvae(folder: Path) -> ModelRecord:
    found, made_of, files = describe_folder(folder, "dvae")
    config = _config(folder, FsqConfig if "levels" in found else DvaeConfig, found)
    with torch.device("meta"):
        model = DiscreteVAE(config)
    return _model(folder, as_dict(config), made_of, files, model)


def _config(folder: Path, kind: Any, config: Facts) -> Any:
    try:
        return kind(**config)
    except TypeError as error:
        raise InputError(
            f"{folder / 'model.json'} has a config that this code cannot read: {error}; "
            "copy or export the model again"
        ) from error


def _model(
    folder: Path, config: Facts, made_of: Facts, files: dict[str, str], model: torch.nn.Module
) -> ModelRecord:
    parameters = sum(p.numel() for p in model.parameters())
    events = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    recipe, ranks = _recipe(folder, made_of)
    return ModelRecord(
        folder, config, made_of, fingerprint_of(files), parameters, events, recipe, ranks
    )


def _recipe(folder: Path, made_of: Facts) -> tuple[Facts, int | None]:
    """The preset and the number of ranks, from the newest checkpoint that can be read."""
    checkpoints = slices.complete(folder)
    if not checkpoints:
        return {}, None
    try:
        meta = slices.read_meta(checkpoints[-1])
    except InputError:  # of another version of the code: no record that can be read
        return {}, None
    identity = meta["identity"]
    for name in ("tokens", "pairs", "dvae", "tokenizer"):
        require(
            identity.get(name) == made_of.get(name),
            f"{checkpoints[-1]} is of another run than {folder / 'model.json'}: its {name} "
            f"{identity.get(name)} are not {made_of.get(name)}; give each run a folder of its own",
        )
    return identity["preset"], meta.get("world")


def _tokens(folder: Path, model: ModelRecord, dvae: ModelRecord) -> SetRecord:
    manifest = _manifest(folder, "tokens")
    known = model.made_of.get("tokens") or []
    require(
        manifest["fingerprint"] in known,
        f"{folder} has fingerprint {manifest['fingerprint']}, and {model.folder} was trained on "
        f"{', '.join(known) or 'nothing on record'}: name the tokens of its training",
    )
    made_by = manifest["made_of"].get("dvae")
    require(
        made_by == dvae.fingerprint,
        f"{folder} was made by dVAE {made_by}, and {dvae.folder} is {dvae.fingerprint}: name the "
        "dVAE that made the tokens",
    )
    return SetRecord(manifest, {})


def _pairs(folder: Path, made_from: set[Any]) -> SetRecord:
    manifest = _manifest(folder, "pairs")
    require(
        manifest["fingerprint"] in made_from,
        f"{folder} has fingerprint {manifest['fingerprint']}, and the tokens were made from "
        f"{', '.join(map(str, made_from))}: name the pairs that were encoded",
    )
    path = folder / "rejects.json"
    if not path.exists():
        return SetRecord(manifest, {})
    ledger = _json(path)
    rows, rejects = manifest["rows"], ledger.get("rejects")
    require(
        ledger.get("rows_out") == rows
        and isinstance(rejects, dict)
        and ledger.get("rows_in") == rows + sum(rejects.values()),
        f"{path} does not account for the {rows} rows of the set: copy the set again",
    )
    return SetRecord(manifest, ledger)


def _manifest(folder: Path, kind: str) -> Facts:
    manifest = read_manifest(folder)
    require(
        manifest["kind"] == kind,
        f"{folder} is a set of {manifest['kind']}, and one of {kind} is needed",
    )
    return manifest


def _report(path: Path, dalle: ModelRecord, dvae: ModelRecord) -> Facts:
    """report.json, of which the losses must be those of the runs."""
    report = _json(path)
    losses = report.get("losses")
    if not isinstance(losses, dict):
        raise InputError(f"{path} has no losses: name the report.json of pipeline.report")
    for name, record in (("dalle", dalle), ("dvae", dvae)):
        said = (losses.get(name) or {}).get("val")
        require(
            not record.events or said == record.validation,
            f"{path} has other losses of stage {name} than {record.folder / 'metrics.jsonl'}: it "
            "is the report of another run, or older than the last update; make it again",
        )
    return report


def _clip(folder: Path) -> Facts:
    config, made_of, files = describe_folder(folder, "clip")
    return {"config": config, "made_of": made_of, "fingerprint": fingerprint_of(files)}


def _json(path: Path) -> Facts:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name another file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); copy or make it again") from error
    require(isinstance(content, dict), f"{path} is no JSON object; copy or make it again")
    return dict(content)
