"""What a job of ingest is: settings, sources, and which rows make which shard.

A plan is a folder inside the set, made once and never changed::

    plan/plan.json        settings, sources, and for each shard the sha256 of its pieces
    plan/00042.json       the pieces of shard 42: what to read of which source

It fixes the shards, so the number of workers, their engine and their order do not matter. Making
it reads listings, footers and the headers of tables, no picture. It appears whole or not at all:
two jobs that start together end up with one plan, and a job with other settings is refused.
"""

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_prep.filters import Filters
from data_prep.sources import Piece, Source, open_source
from pipeline.console import InputError
from pipeline.data.schema import ROWS_PER_SHARD, read_json
from pipeline.files import write_json

SCHEMA_VERSION = 1
SHARD_BYTES = 1 << 30  # of the sources, about: a shard is one unit of work and of loss
DUPLICATES = ("pair", "image", "off")
NEAR_DUPLICATES = ("report", "drop", "off")
BYTES = ("inline", "reference")


@dataclass(frozen=True)
class Settings:
    """Everything but the sources that decides about the bytes of a set.

    Args:
        filters: which captions and pictures are taken.
        val_fraction: share of the groups of rows that are for validation, in [0, 1].
        bytes: "inline" keeps the pictures in the shards, "reference" where they are.
        duplicates: what the second of two equal rows must share with the first to be left out:
            "pair" the picture and the caption, "image" the picture; "off" keeps them.
        near_duplicates: the same for pictures of one perceptual hash: "report", "drop" or "off".
        excluded: sha256 of the list of hashes to leave out (an evaluation set); "" without one.
        score: sha256 of the file with the user's score, and its name; "" without one.
        rows_per_shard: at most, but for an archive, which is not divided.
    """

    filters: Filters = field(default_factory=Filters)
    val_fraction: float = 0.01
    bytes: str = "inline"
    duplicates: str = "pair"
    near_duplicates: str = "report"
    excluded: str = ""
    score: str = ""
    rows_per_shard: int = ROWS_PER_SHARD["pairs"]

    def __post_init__(self) -> None:
        for name, known in (
            ("bytes", BYTES),
            ("duplicates", DUPLICATES),
            ("near_duplicates", NEAR_DUPLICATES),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; take {', '.join(known)}")
        if not 0.0 <= self.val_fraction <= 1.0:
            raise InputError(f"--val-fraction {self.val_fraction} is outside [0, 1]")
        if not 1 <= self.rows_per_shard <= 1 << 20:
            raise InputError(f"--rows-per-shard {self.rows_per_shard} is outside 1..{1 << 20}")


@dataclass(frozen=True)
class Where:
    """A source as the user named it: ``images`` is the folder beside COCO's or a TSV's captions."""

    uri: str
    images: str | None = None

    def open(self) -> Source:
        """The source."""
        return open_source(self.uri, self.images)


@dataclass(frozen=True)
class Plan:
    """A plan on disk, and where its sources lie for this job; picklable.

    Args:
        out: folder of the set.
        where: the sources, in the order of the plan.
        settings: as they were planned.
        shards: sha256 of the pieces of each shard.
        n_bytes: what each shard takes of the sources.
        hash: of all the above but ``out`` and ``where``.
    """

    out: Path
    where: tuple[Where, ...]
    settings: Settings
    names: tuple[str, ...]
    shards: tuple[str, ...]
    n_bytes: tuple[int, ...]
    hash: str

    def pieces(self, k: int) -> Iterator[tuple[int, Piece]]:
        """What shard ``k`` is made of: number of the source, and the piece.

        Raises:
            InputError: the file is damaged.
        """
        path = self.out / "plan" / f"{k:05d}.json"
        try:
            text = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror}): {_afresh(self.out)}"
            ) from (error)
        if sha256(text).hexdigest() != self.shards[k]:
            raise InputError(f"{path} is not the one that was planned: {_afresh(self.out)}")
        for source, piece in json.loads(text):
            yield source, Piece(**piece)


def _afresh(out: Path) -> str:
    return f"delete {out} and ingest again"


def _divide(sources: list[Source], rows: int) -> Iterator[tuple[list[tuple[int, Piece]], int]]:
    """Pieces of each shard and what they take of the sources, in the order of the sources."""
    shard: list[tuple[int, Piece]] = []
    n_rows = n_bytes = 0
    for number, source in enumerate(sources):
        for piece in source.pieces(rows):
            more = max(piece.n_rows, 0)
            if shard and (n_rows + more > rows or n_bytes + piece.n_bytes > SHARD_BYTES):
                yield shard, n_bytes
                shard, n_rows, n_bytes = [], 0, 0
            shard.append((number, piece))
            n_rows, n_bytes = n_rows + more, n_bytes + piece.n_bytes
    if shard:
        yield shard, n_bytes


def _write(folder: Path, sources: list[Source], settings: Settings) -> dict[str, Any]:
    """Write a plan into ``folder``; returns its description."""
    folder.mkdir(parents=True)
    shards = []
    for k, (pieces, n_bytes) in enumerate(_divide(sources, settings.rows_per_shard)):
        text = json.dumps(
            [[number, dataclasses.asdict(piece)] for number, piece in pieces]
        ).encode()
        (folder / f"{k:05d}.json").write_bytes(text)
        shards.append({"bytes": n_bytes, "sha256": sha256(text).hexdigest()})
    content = {
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "sources": [{"kind": source.kind, "name": source.name} for source in sources],
        "shards": shards,
    }
    digest = sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    content |= {"schema_version": SCHEMA_VERSION, "hash": digest}
    write_json(folder / "plan.json", content)
    return content


def make_plan(where: list[Where], settings: Settings, out: Path) -> Plan:
    """The plan in ``out``, which is made when there is none.

    A plan that is there is taken as it is, without a look at the sources, if it has the same
    settings and sources of the same names: so a job that goes on starts at once.

    Raises:
        InputError: a source is missing, or ``out`` is planned for another set.
    """
    _check_names(out, where)
    path = out / "plan" / "plan.json"
    if not path.exists():
        if (out / "plan").exists():
            raise InputError(f"{out}/plan holds no plan.json: delete it and start again")
        if (out / "manifest.json").exists():
            raise InputError(f"{out} holds a finished set: name another folder or delete it")
        sources = [source.open() for source in where]
        for source in sources:
            if settings.bytes == "reference" and not source.can_refer:
                raise InputError(
                    f"--reference: {source.name} holds its pictures in a column, and nothing can "
                    "refer to a part of that: ingest it without --reference"
                )
        _place(out, sources, settings)
    return _same(out, where, settings)


def _check_names(out: Path, where: list[Where]) -> None:
    """Names go into JSON and to libraries that take Unicode only."""
    for path in (str(out), *(source.uri for source in where)):
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the name of {path!r} is not UTF-8: rename it") from error
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")


def _place(out: Path, sources: list[Source], settings: Settings) -> None:
    """Put a new plan into ``out``, unless another process was faster."""
    temporary = out / f".plan.{uuid.uuid4().hex[:8]}.tmp"
    try:
        _write(temporary, sources, settings)
        os.rename(temporary, out / "plan")
    except OSError:
        if not (out / "plan" / "plan.json").exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _same(out: Path, where: list[Where], settings: Settings) -> Plan:
    """The plan in ``out``, if it is for these sources and settings."""
    content = read_json(out / "plan" / "plan.json", SCHEMA_VERSION)
    try:
        names = tuple(source["name"] for source in content["sources"])
        shards = content["shards"]
        digests = tuple(shard["sha256"] for shard in shards)
        n_bytes = tuple(int(shard["bytes"]) for shard in shards)
        planned = dict(content["settings"])
        digest = str(content["hash"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{out}/plan/plan.json lacks or garbles {error}: {_afresh(out)}"
        ) from error
    wanted = _flat(json.loads(json.dumps(dataclasses.asdict(settings))))
    found = _flat(planned)
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise InputError(
                f"{out} is planned with {name} {json.dumps(found.get(name))} and not "
                f"{json.dumps(wanted[name])}: name another folder, or delete that one"
            )
    named = tuple(source.open().name for source in where)
    if named != names:
        raise InputError(
            f"{out} is planned for the sources {', '.join(names)} and not {', '.join(named)}: "
            "name another folder, or delete that one"
        )
    return Plan(out, tuple(where), settings, names, digests, n_bytes, digest)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings.get("filters", {}), **settings, "filters": None}


def is_up_to_date(plan: Plan) -> bool:
    """Whether planning anew, from what lies in the sources now, would give the same plan."""
    temporary = plan.out / f".plan.{uuid.uuid4().hex[:8]}.tmp"
    try:
        content = _write(temporary, [source.open() for source in plan.where], plan.settings)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return bool(content["hash"] == plan.hash)
