"""Pictures with captions -> pair shards and a ledger of everything that was left out.

    python -m data_prep.ingest SOURCE... --out DIR --preset dvae_demo
    deepspeed --module data_prep.ingest ... (torchrun, srun)     ranks share the shards
    python -m data_prep.ingest ... --engine ray                  tasks of a Ray cluster

A plan fixes the shards (``plan.py``). A first pass decodes every picture once, to check, measure,
filter and hash it (``check.py``, ``facts.py``); of rows that repeat others the first is kept; a
second pass writes the shards. No bad row stops the job, and none is lost without a name:
``rejects.json`` beside the manifest counts rows in, rows out, rejects by reason and notes about
accepted rows, ``rejects.jsonl`` lists each reject, ``report.html`` shows both. The same sources
give the same bytes, whoever makes them and however often they are stopped: start it again.
"""

import argparse
import dataclasses
import io
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep import ledger as ledgers
from data_prep.check import Fact
from data_prep.engines import ENGINES, Launch, launch_of, run, wait, workers_of
from data_prep.facts import (
    Job,
    drops_path,
    facts_folder,
    facts_path,
    identity_of,
    identity_of_score,
    inspect_shard,
    merge,
    read_drops,
    read_facts,
    read_held,
    read_merged,
    write_held,
)
from data_prep.filters import add_flags, filters_of, load_score
from data_prep.ledger import Ledger, table
from data_prep.page import write_page
from data_prep.plan import (
    DUPLICATES,
    NEAR_DUPLICATES,
    Plan,
    Settings,
    Where,
    is_up_to_date,
    make_plan,
)
from data_prep.sources import RawPair
from pipeline.console import Bar, InputError, a_path, command, logger
from pipeline.data.commit import is_committed, write_manifest, write_shard
from pipeline.data.schema import image_sha, read_json, shard_name
from pipeline.files import write_bytes, write_json

MIB = 1 << 20
AFRESH = "delete that folder and start again"

log = logger("ingest")


def made_of(plan: Plan) -> dict[str, Any]:
    """``made_of`` of the pair set: what decides about its bytes."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(plan.settings)))
    filters = settings.pop("filters")
    return {
        **settings,
        "filters": filters,
        "image_size": filters["image_size"],
        "upscale": filters["upscale"],
        "plan": plan.hash,
        "sources": list(plan.names),
    }


# ---- the second pass


def process_shard(job: Job, k: int, advance: Callable[[int], None] | None = None) -> int:
    """Write pair shard ``k``, its part of the ledger first; returns its rows.

    A function of the plan, the facts and the bytes of the sources: whoever calls it, and however
    often, the shard is the same.

    Raises:
        InputError: a source has changed since its rows were inspected, or is gone.
    """
    plan = job.plan
    facts = list(_with_drops(plan, k))
    write_ledger(plan, k, facts)
    waiting: list[dict[str, Any]] = []  # the rows for validation come last
    if plan.settings.bytes == "inline":
        rows = _inline(plan, k, facts, advance)
    else:
        rows = _by_reference(facts)

    def training() -> Iterator[dict[str, Any]]:
        for row, is_val in rows:
            if is_val:
                waiting.append(row)
            else:
                yield row

    shard = write_shard(plan.out, k, "pairs", training(), made_of(plan), waiting)
    return int(shard["rows"])


def _with_drops(plan: Plan, k: int) -> Iterator[Fact]:
    drops = read_drops(plan, k)
    for row, fact in enumerate(read_facts(plan.out, k)):
        if row in drops:
            reason, detail = drops[row]
            fact = replace(fact, reason=reason, detail=detail)
        yield fact


def _columns(fact: Fact) -> dict[str, Any]:
    return {
        "key": fact.key,
        "caption": fact.caption,
        "width": fact.width,
        "height": fact.height,
        "image_sha": fact.image_sha,
        "phash": fact.phash,
    }


def _by_reference(facts: Iterable[Fact]) -> Iterator[tuple[dict[str, Any], bool]]:
    for fact in facts:
        if not fact.reason:
            place = {"source": fact.source, "file": fact.file}
            place |= {"offset": fact.offset, "size": fact.size}
            yield _columns(fact) | place, fact.is_val


def _inline(
    plan: Plan, k: int, facts: list[Fact], advance: Callable[[int], None] | None
) -> Iterator[tuple[dict[str, Any], bool]]:
    """The accepted rows with their pictures, which are read once more and held to their hash."""
    seen = 0
    for pair in _rows(plan, k):
        fact = facts[seen] if seen < len(facts) else Fact("")
        seen += 1
        if advance is not None:
            advance(pair.n_bytes)
        if fact.reason:
            continue
        if pair.key != fact.key or pair.image is None or image_sha(pair.image) != fact.image_sha:
            raise InputError(_changed(plan, pair.key))
        yield _columns(fact) | {"image": pair.image}, fact.is_val
    if seen != len(facts):
        raise InputError(_changed(plan, f"of shard {k}"))


def _rows(plan: Plan, k: int) -> Iterator[RawPair]:
    for number, piece in plan.pieces(k):
        yield from plan.where[number].open().rows(piece)


def _changed(plan: Plan, row: str) -> str:
    return (
        f"the sources have changed since row {row!r} was inspected: delete {plan.out} and ingest "
        "again when nothing writes into them any more"
    )


# ---- the ledger


def _ledger_path(plan: Plan, k: int) -> Path:
    return facts_folder(plan.out) / f"{k:05d}.ledger.json"


def write_ledger(plan: Plan, k: int, facts: Iterable[Fact]) -> None:
    """What became of the rows of shard ``k``, and a line for each reject."""
    ledger, lines = Ledger(), io.StringIO()
    for fact in facts:
        ledger.rows_in += 1
        if not fact.reason:
            ledger.accept(
                fact.key, fact.caption, width=fact.width, height=fact.height, n_bytes=fact.size,
                is_val=fact.is_val, notes=fact.notes, thumbnail=fact.thumbnail,
            )  # fmt: skip
        else:
            ledger.reject(
                fact.key, fact.reason, fact.detail, caption=fact.caption, thumbnail=fact.thumbnail
            )
            line = {"key": fact.key, "reason": fact.reason, "detail": fact.detail}
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    path, told = _ledger_path(plan, k), lines.getvalue().encode()
    write_bytes(path.with_suffix(".jsonl"), told)
    write_held(path, {"ledger": ledger.as_dict(), "lines": zlib.crc32(told)})


def _write_summary(plan: Plan) -> dict[str, Any]:
    """Merge the ledgers of all shards into those of the set, and a page; returns the counts."""
    paths = [_ledger_path(plan, k) for k in range(len(plan.shards))]
    summary = ledgers.merge(read_held(path)["ledger"] for path in paths)
    summary["near_duplicates"] = read_merged(plan)["near"]
    temporary = plan.out / f".rejects.jsonl.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            for path in paths:
                lines = path.with_suffix(".jsonl").read_bytes()
                if zlib.crc32(lines) != read_held(path)["lines"]:
                    raise InputError(f"{path.stem}.jsonl in {path.parent} is damaged: {AFRESH}")
                file.write(lines)
        os.replace(temporary, plan.out / "rejects.jsonl")
    finally:
        temporary.unlink(missing_ok=True)
    facts = made_of(plan)
    sources = ", ".join(facts.pop("sources"))
    settings = {"filters": facts.pop("filters"), "settings": facts}
    write_page(plan.out / "report.html", sources, summary, settings)
    write_json(plan.out / "rejects.json", summary)
    return summary


def finish(plan: Plan) -> dict[str, Any]:
    """Ledger, report and manifest of a set whose shards are all there; returns the ledger."""
    summary = _write_summary(plan)
    _hold_to_ledgers(plan)
    if plan.settings.bytes == "reference":
        uris = [source.open().place.uri for source in plan.where]
        write_json(plan.out / "sources.json", uris)
    write_manifest(plan.out, "pairs", len(plan.shards), made_of(plan))
    shutil.rmtree(facts_folder(plan.out), ignore_errors=True)
    return summary


def _hold_to_ledgers(plan: Plan) -> None:
    """Stop where a shard's record has another number of rows than its ledger."""
    for k in range(len(plan.shards)):
        sidecar = read_json((plan.out / shard_name(k)).with_suffix(".json"))
        ledger = read_held(_ledger_path(plan, k))["ledger"]
        for name, wanted in (("rows", ledger["rows_out"]), ("val_rows", ledger["val_rows"])):
            if sidecar.get(name) != wanted:
                raise InputError(
                    f"{plan.out}/{shard_name(k)} has {name} {sidecar.get(name)!r} in its record, "
                    f"{wanted} were written: delete the record, and a new start makes it again"
                )


# ---- the job


@dataclass(frozen=True)
class Team:
    """Who does it: a rank of a launch, with an engine and so many workers (None: one a core)."""

    launch: Launch = field(default_factory=Launch)
    engine: str = "local"
    workers: int | None = None


def ingest(job: Job, team: Team, only_inspect: bool = False) -> dict[str, Any] | None:
    """Make the set of ``job``, or this rank's part of it.

    Returns:
        The ledger of the finished set, to the one rank that tells it; None to the others.

    Raises:
        InputError: no row is accepted, ``out`` holds another set, or whatever a shard raises.
    """
    plan = job.plan
    if _is_finished(plan):
        return _same_set(plan) if team.launch.rank == 0 else None
    if not plan.shards:
        shutil.rmtree(plan.out / "plan", ignore_errors=True)  # the next try may find some
        raise InputError(f"no picture and no caption in {', '.join(plan.names)}: {PAIRS}")
    try:
        summary = _make(job, team, only_inspect)
    except (InputError, OSError):
        if not _is_finished(plan):
            raise
        summary = None
    if summary is None and _is_finished(plan):
        # another rank, which tells it, or another job in this folder was faster, and has tidied up
        return _same_set(plan) if team.launch.world == 1 else None
    return summary


def _make(job: Job, team: Team, only_inspect: bool) -> dict[str, Any] | None:
    """Both passes over this rank's shards, and the end if no other rank is still at work."""
    plan = job.plan
    if not drops_path(plan.out).exists():
        _each("inspect", partial(inspect_shard, job), job, team, _is_inspected)
        if not _drops(plan, team, only_inspect):
            log.info("done; other ranks are still inspecting")
            return None
    _refuse_nothing(plan)
    if only_inspect:
        log.info(
            "all %d shards are inspected; start again without --only-inspect", len(plan.shards)
        )
        return None
    _each("write", partial(process_shard, job), job, team, _is_written)
    if not all(_is_written(plan, k) for k in range(len(plan.shards))):
        log.info("done; other ranks are still at work, the last one writes the manifest")
        return None
    return finish(plan)


PAIRS = "--help lists what sources look like"


def _is_finished(plan: Plan) -> bool:
    return (plan.out / "manifest.json").exists()


def _is_inspected(plan: Plan, k: int) -> bool:
    return facts_path(plan.out, k).exists()


def _is_written(plan: Plan, k: int) -> bool:
    return is_committed(plan.out, k, made_of(plan)) and _ledger_path(plan, k).exists()


def _each(
    what: str,
    task: Callable[..., int],
    job: Job,
    team: Team,
    is_done: Callable[[Plan, int], bool],
) -> None:
    """Run a pass over this rank's shards, with a bar that counts MiB of the sources."""
    plan = job.plan
    mine = team.launch.share(range(len(plan.shards)))
    todo = [k for k in mine if not is_done(plan, k)]
    total, n_left = (sum(plan.n_bytes[k] for k in shards) for shards in (mine, todo))
    workers = workers_of(team.workers, len(todo))
    if len(todo) < len(mine):
        log.info("%s: %d of %d shards are done already", what, len(mine) - len(todo), len(mine))
    with Bar(f"{what}, MiB", -(-total // MIB), (total - n_left) // MIB) as bar:
        seen, rows = total - n_left, 0

        def advance(n_bytes: int) -> None:
            nonlocal seen
            seen += n_bytes
            bar.advance(min(seen, total) // MIB - bar.done, f"{rows} pairs" if rows else "")

        if team.engine == "local" and workers == 1:
            task = partial(task, advance=advance)
        for k, n in run(task, todo, engine=team.engine, workers=workers):
            rows += n
            if team.engine != "local" or workers > 1:
                advance(plan.n_bytes[k])
        bar.advance(bar.total - bar.done, f"{rows} pairs")


def _drops(plan: Plan, team: Team, only_inspect: bool) -> bool:
    """Have the drop lists made, by this rank or the first one; False while rows are missing."""
    n_shards = len(plan.shards)

    def inspected() -> int:
        if _is_finished(plan):  # by another job, while this one was looking
            return n_shards
        return sum(_is_inspected(plan, k) for k in range(n_shards))

    if only_inspect and inspected() < n_shards:
        return False
    if only_inspect or team.launch.rank == 0:
        wait(inspected, n_shards, "shards are inspected")
        merge(plan)
    else:
        drops = drops_path(plan.out)
        wait(lambda: int(drops.exists() or _is_finished(plan)), 1, "drop lists are there")
    return True


def _refuse_nothing(plan: Plan) -> None:
    """Stop before an empty set is written; the next try may have other settings.

    Raises:
        InputError: no row of the sources is accepted.
    """
    if read_merged(plan)["accepted"] != 0:
        return
    for k in range(len(plan.shards)):
        write_ledger(plan, k, _with_drops(plan, k))
    summary = _write_summary(plan)
    shutil.rmtree(plan.out / "plan", ignore_errors=True)
    names = ", ".join(plan.names)
    if summary["rows_in"] == 0:
        raise InputError(f"no picture and no caption in {names}: {PAIRS}")
    reason, n = max(summary["rejects"].items(), key=lambda item: item[1])
    raise InputError(
        f"none of the {summary['rows_in']} rows of {names} was accepted, {n} of them for: "
        f"{reason}; {plan.out}/report.html shows them"
    )


def _same_set(plan: Plan) -> dict[str, Any]:
    """The ledger of a finished set, if it is the one asked for and its sources are as they were."""
    out = plan.out
    shutil.rmtree(facts_folder(out), ignore_errors=True)
    if read_json(out / "manifest.json").get("made_of") != made_of(plan):
        raise InputError(f"{out} holds another set: name another folder or delete it")
    if not is_up_to_date(plan):
        raise InputError(
            f"{out} is finished, and {', '.join(plan.names)} has changed since (names or sizes of "
            "files): name another folder or delete it"
        )
    if not all(is_committed(out, k, made_of(plan)) for k in range(len(plan.shards))):
        raise InputError(f"{out} has a manifest and lacks shards: delete {out} and ingest again")
    log.info("%s holds this set already (same files by name and size); nothing to do", out)
    try:
        summary: dict[str, Any] = json.loads((out / "rejects.json").read_text(encoding="utf-8"))
        table(summary)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{out}/rejects.json: {error}; delete {out} and ingest again") from error
    return summary


# ---- the command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="data_prep.ingest", description=__doc__.splitlines()[0])
    source = parser.add_argument_group("what comes in")
    source.add_argument(
        "source", nargs="+", metavar="SOURCE",
        help="folder of image + .txt pairs, .tar, .parquet, COCO captions .json or .tsv; also "
        "s3:// and gs://",
    )  # fmt: skip
    source.add_argument("--images", help="folder of the pictures that a .json or .tsv names")
    taken = parser.add_argument_group("what is taken")
    size = taken.add_mutually_exclusive_group()
    size.add_argument("--preset", help="take the image size from this preset")
    size.add_argument(
        "--image-size", type=int, default=256, help="pixels a side to train at (default 256)"
    )
    taken.add_argument(
        "--score", help="FILE.py:FUNCTION, a judge of your own (data_prep/filters.py)"
    )
    taken.add_argument(
        "--exclude-hashes", type=a_path,
        help="pictures to keep out, an evaluation set's (data_prep.stats --hashes lists them)",
    )  # fmt: skip
    taken.add_argument(
        "--duplicates", choices=DUPLICATES, default="pair",
        help="rows with the picture and the caption of an earlier row go (default: pair)",
    )  # fmt: skip
    taken.add_argument(
        "--near-duplicates", choices=NEAR_DUPLICATES, default="report",
        help="pictures with the perceptual hash of an earlier one (default: report)",
    )  # fmt: skip
    add_flags(parser)
    made = parser.add_argument_group("what is made")
    made.add_argument("--out", required=True, type=a_path, help="folder for the shards")
    made.add_argument(
        "--reference", action="store_true",
        help="keep file, offset and size of each picture and not its bytes: nothing is copied",
    )  # fmt: skip
    made.add_argument(
        "--val-fraction", type=float, default=0.01, help="kept for validation (default 0.01)"
    )
    made.add_argument(
        "--rows-per-shard", type=int, default=Settings.rows_per_shard,
        help=f"at most (default {Settings.rows_per_shard}); archives are not divided",
    )  # fmt: skip
    job = parser.add_argument_group("who does it")
    job.add_argument("--workers", type=int, help="processes (default: one a core)")
    job.add_argument("--engine", choices=ENGINES, default="local", help="(default: local)")
    job.add_argument(
        "--only-inspect", action="store_true",
        help="stop after the first pass: for arrays of jobs, which must not wait for each other",
    )  # fmt: skip
    job.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def _job(args: argparse.Namespace) -> Job:
    image_size = args.image_size
    if args.preset is not None:
        from pipeline import presets

        image_size = presets.load(args.preset).model.image_size
    filters = filters_of(args, image_size)
    if args.score is not None:
        load_score(args.score)  # says what is wrong with it before anything is read
    settings = Settings(
        filters=filters,
        val_fraction=args.val_fraction,
        bytes="reference" if args.reference else "inline",
        duplicates=args.duplicates,
        near_duplicates=args.near_duplicates,
        excluded=identity_of(args.exclude_hashes),
        score=identity_of_score(args.score),
        rows_per_shard=args.rows_per_shard,
    )
    where = [Where(source, args.images) for source in sorted(args.source, key=_place_of)]
    return Job(make_plan(where, settings, args.out), args.exclude_hashes, args.score)


def _place_of(source: str) -> tuple[str, str]:
    """What sources are sorted by, however their paths are spelled."""
    path = source if "://" in source else os.path.abspath(source)
    return os.path.basename(path.rstrip("/")), path


def main() -> None:
    """Parse the command line and ingest."""
    args = _parser().parse_args()
    launch = launch_of(dict(os.environ))
    summary = ingest(_job(args), Team(launch, args.engine, args.workers), args.only_inspect)
    if summary is not None:
        sys.stdout.write(table(summary))


if __name__ == "__main__":
    command(main)
