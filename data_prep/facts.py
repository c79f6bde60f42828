"""The first pass of ingest: what is known of every row, and which rows go because of other rows.

    plan/facts/00042.arrow       a ``Fact`` for each row of shard 42's pieces, in their order
    plan/facts/00042.npy         uint64 [rows, 4]: hash of key, of picture and caption, of picture;
                                 phash
    plan/facts/00042.drops.json  its accepted rows that repeat an earlier one, of any shard
    plan/facts/drops.json        written last: what the drop lists add up to

They belong to their plan and go with it. The second pass reads them, all held to a crc32, and the
bytes. They are deleted when the set is finished.
"""

import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from data_prep.check import Fact, check_row
from data_prep.filters import Score, load_score
from data_prep.hashes import MIN_BITS, HashList
from data_prep.ledger import ACCEPTED_EXAMPLES, REJECTED_EXAMPLES, thumbnail
from data_prep.plan import Plan
from pipeline.console import InputError
from pipeline.data.images import Decoded
from pipeline.files import json_bytes, write_bytes, write_json

SCHEMA_VERSION = 1
CRC, CRC_OF_HASHES = "crc32", "crc32 of hashes"  # in the metadata of the record batch
SCORED = 64  # rows whose pictures a user's score sees at once
PART = 1 << 25  # rows whose hashes are compared in one go: 0.5 GB, and as much to sort them
KEY, PAIR, IMAGE, NEAR = range(4)  # columns of the hashes
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("key", "reason", "detail", "caption")),
        *(pa.field(name, pa.int32()) for name in ("width", "height")),
        pa.field("image_sha", pa.binary(16)),
        pa.field("phash", pa.uint64()),
        pa.field("notes", pa.list_(pa.string())),
        pa.field("is_val", pa.bool_()),
        pa.field("source", pa.uint16()),
        pa.field("file", pa.string()),
        *(pa.field(name, pa.int64()) for name in ("offset", "size")),
        pa.field("thumbnail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Job:
    """A plan, and what it names by its hash only; picklable.

    Args:
        plan: what is made.
        exclude: file with hashes of pictures to leave out.
        score: the user's score, FILE.py:FUNCTION.
    """

    plan: Plan
    exclude: Path | None = None
    score: str | None = None


def facts_folder(out: Path) -> Path:
    """The folder of all that is known while a set is made."""
    return out / "plan" / "facts"


def facts_path(out: Path, k: int) -> Path:
    """Where the facts of shard ``k`` are; the file is there when they are complete."""
    return facts_folder(out) / f"{k:05d}.arrow"


def inspect_shard(job: Job, k: int, advance: Callable[[int], None] | None = None) -> int:
    """Write the facts of shard ``k``; returns how many of its rows are accepted so far.

    ``advance`` is told the bytes of each row, as its source counts them.

    Raises:
        InputError: a source, the list of hashes or the user's score cannot be used.
    """
    plan = job.plan
    _hold_to_plan(job)
    excluded = None if job.exclude is None else HashList.from_file(job.exclude)
    score = None if job.score is None else load_score(job.score)
    facts = list(_with_examples(_scored(_checked(plan, k, excluded, advance), score)))
    write_facts(plan.out, k, facts)
    return sum(not fact.reason for fact in facts)


def identity_of(path: Path | None) -> str:
    """sha256 of a file, empty for none.

    Raises:
        InputError: it cannot be read.
    """
    if path is None:
        return ""
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name another file") from error


def identity_of_score(score: str | None) -> str:
    """sha256 of the file of a user's score, and the name of its function; empty for none.

    Raises:
        InputError: it names no file and function.
    """
    if score is None:
        return ""
    path, _, function = score.rpartition(":")
    if not path:
        raise InputError(f"--score {score} names no function: give FILE.py:FUNCTION")
    return f"{identity_of(Path(path))} {function}"


def _hold_to_plan(job: Job) -> None:
    """Stop when a file that the plan names by its hash is edited while the job runs."""
    settings = job.plan.settings
    for name, planned, found in (
        (job.exclude, settings.excluded, identity_of(job.exclude)),
        (job.score, settings.score, identity_of_score(job.score)),
    ):
        if planned != found:
            raise InputError(
                f"{name} is not what this set was planned with: put the old file back, or delete "
                f"{job.plan.out} and ingest again"
            )


def write_facts(out: Path, k: int, facts: list[Fact]) -> None:
    """Write the facts of shard ``k``; the hashes first, for with the facts both are complete."""
    path = facts_path(out, k)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    np.save(file, _hashes(facts))
    hashes = file.getvalue()
    write_bytes(path.with_suffix(".npy"), hashes)
    write_bytes(path, _to_arrow(facts, hashes))


def _checked(
    plan: Plan, k: int, excluded: HashList | None, advance: Callable[[int], None] | None
) -> Iterator[tuple[Fact, Decoded | None]]:
    taken = plan.settings
    must_refer = taken.bytes == "reference"
    for number, piece in plan.pieces(k):
        for pair in plan.where[number].open().rows(piece):
            yield check_row(pair, number, taken.filters, taken.val_fraction, excluded, must_refer)
            if advance is not None:
                advance(pair.n_bytes)


def _scored(
    rows: Iterator[tuple[Fact, Decoded | None]], score: Score | None
) -> Iterator[tuple[Fact, Decoded | None]]:
    """The rows, the accepted ones seen by the user's score, in their order."""
    if score is None:
        yield from rows
        return
    waiting: list[tuple[Fact, Decoded | None]] = []

    def judged() -> Iterator[tuple[Fact, Decoded | None]]:
        seen = [(f, image) for f, image in waiting if not f.reason and image is not None]
        reasons = iter(score([image.pixels for _, image in seen], [f.caption for f, _ in seen]))
        for fact, image in waiting:
            reason = None if fact.reason or image is None else next(reasons)
            yield (replace(fact, reason=reason, detail="score") if reason else fact), image

    for row in rows:
        waiting.append(row)
        if len(waiting) == SCORED:
            yield from judged()
            waiting = []
    yield from judged()


def _with_examples(rows: Iterator[tuple[Fact, Decoded | None]]) -> Iterator[Fact]:
    """Thumbnails for the first rows of each reason, and of those that are accepted."""
    seen: Counter[str] = Counter()
    for fact, image in rows:
        seen[fact.reason] += 1
        limit = REJECTED_EXAMPLES if fact.reason else ACCEPTED_EXAMPLES
        if image is not None and seen[fact.reason] <= limit:
            fact = replace(fact, thumbnail=thumbnail(image.pixels))
        yield fact


def _hash(*parts: bytes) -> int:
    return int.from_bytes(blake2b(b"\0".join(parts), digest_size=8).digest(), "little")


def _hashes(facts: list[Fact]) -> NDArray[np.uint64]:
    rows = [
        (
            _hash(fact.key.encode()),
            _hash(fact.image_sha, fact.caption.encode()),
            _hash(fact.image_sha),
            fact.phash,
        )
        for fact in facts
    ]
    return np.array(rows, np.uint64).reshape(len(rows), 4)


def _to_arrow(facts: list[Fact], hashes: bytes) -> bytes:
    arrays = [pa.array([getattr(fact, f.name) for fact in facts], f.type) for f in SCHEMA]
    batch = pa.record_batch(arrays, schema=SCHEMA)
    sink = io.BytesIO()
    with ipc.new_file(sink, SCHEMA) as writer:
        sums = {CRC: _crc(batch.serialize()), CRC_OF_HASHES: _crc(hashes)}
        writer.write_batch(batch, custom_metadata=sums)
    return sink.getvalue()


def _crc(data: Any) -> str:
    return f"{zlib.crc32(data):08x}"


def read_facts(out: Path, k: int) -> Iterator[Fact]:
    """The facts of shard ``k``, row by row.

    Raises:
        InputError: they are missing or damaged.
    """
    for row in _table(out, k).to_pylist():
        yield Fact(**row | {"notes": tuple(row["notes"])})


def _table(out: Path, k: int, *, with_hashes: bool = False) -> pa.RecordBatch:
    """The facts of a shard, held to their crc32, and to theirs the hashes beside them."""
    path = facts_path(out, k)
    try:
        with pa.OSFile(str(path)) as file:
            found = ipc.open_file(file).get_batch_with_custom_metadata(0)
        batch, written = found.batch, found.custom_metadata or {}
        if written.get(CRC) != _crc(batch.serialize()).encode():
            raise pa.ArrowInvalid("its crc32 is another")
        if with_hashes:
            path = path.with_suffix(".npy")
            if written.get(CRC_OF_HASHES) != _crc(path.read_bytes()).encode():
                raise pa.ArrowInvalid("its crc32 is another")
        return batch
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: object) -> InputError:
    return InputError(
        f"{path} is missing or damaged ({error}): delete {path.parent} and start again"
    )


def write_held(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that ``read_held`` holds to its crc32."""
    write_json(path, {**content, CRC: _crc(json_bytes(content))})


def read_held(path: Path) -> dict[str, Any]:
    """What ``write_held`` wrote.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        crc = content.pop(CRC)
        if crc != _crc(json_bytes(content)):
            raise ValueError("its crc32 is another")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error
    found: dict[str, Any] = content
    return found


# ---- rows that repeat others


def drops_path(out: Path, k: int | None = None) -> Path:
    """The drop list of shard ``k``, there when it has one; without ``k`` what they add up to.

    The latter is written last: with it, all of them are complete.
    """
    return facts_folder(out) / ("drops.json" if k is None else f"{k:05d}.drops.json")


def merge(plan: Plan) -> dict[str, Any]:
    """Compare the hashes of all rows and write the drop lists; of equal rows the first stays.

    In this order: rows of one key; rows of one picture (and caption); rows of one perceptual hash.
    The result is a function of the facts alone: ``accepted``, and ``near`` with the rows that share
    their perceptual hash and the pictures that they would leave.
    """
    n_shards = len(plan.shards)
    kept = [_is_accepted(plan.out, k) for k in range(n_shards)]
    n_parts = -(-sum(map(len, kept)) // PART) or 1
    settings = plan.settings
    kinds = [(KEY, "duplicate key")]
    if settings.duplicates == "pair":
        kinds.append((PAIR, "duplicate picture and caption"))
    if settings.duplicates == "image":
        kinds.append((IMAGE, "duplicate picture"))
    if settings.near_duplicates == "drop":
        kinds.append((NEAR, "near-duplicate picture"))
    drops: list[NDArray[np.int64]] = []
    for kind, (column, _) in enumerate(kinds):
        for part in range(n_parts):
            found = _repeats(plan.out, column, kept, part, n_parts)
            for k in np.unique(found[:, 0]):
                kept[k][found[found[:, 0] == k, 1]] = False
            drops.append(np.insert(found, 4, kind, axis=1))
    near = {}
    if settings.near_duplicates != "off":
        parts = [_near(plan.out, kept, part, n_parts) for part in range(n_parts)]
        near = {name: sum(part[name] for part in parts) for name in parts[0]}
    found = np.concatenate(drops)
    _write_drops(plan, found, [reason for _, reason in kinds])
    summary = {
        "schema_version": SCHEMA_VERSION,
        "plan": plan.hash,
        "near": near,
        "accepted": sum(int(mask.sum()) for mask in kept),
        "dropped": {f"{k:05d}": int((found[:, 0] == k).sum()) for k in np.unique(found[:, 0])},
    }
    write_held(drops_path(plan.out), summary)
    return summary


def _write_drops(plan: Plan, drops: NDArray[np.int64], reasons: list[str]) -> None:
    """A list for each shard: [row, reason, which row it repeats]."""
    first_keys = np.empty(len(drops), object)
    for k in np.unique(drops[:, 2]):
        here = np.flatnonzero(drops[:, 2] == k)
        keys = _table(plan.out, int(k)).column("key").take(pa.array(drops[here, 3]))
        first_keys[here] = keys.to_pylist()
    for k in np.unique(drops[:, 0]):
        here = np.flatnonzero(drops[:, 0] == k)
        here = here[np.argsort(drops[here, 1])]
        rows = [
            [int(drops[i, 1]), reasons[drops[i, 4]], f"the same as {first_keys[i]!r}"] for i in here
        ]
        content = {"schema_version": SCHEMA_VERSION, "plan": plan.hash, "drops": rows}
        write_held(drops_path(plan.out, int(k)), content)


def _hashes_of(out: Path, k: int) -> NDArray[np.uint64]:
    path = facts_path(out, k).with_suffix(".npy")
    try:
        hashes: NDArray[np.uint64] = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path} is missing or damaged ({error}): delete {path.parent} and start again"
        ) from error
    return hashes


def _is_accepted(out: Path, k: int) -> NDArray[np.bool_]:
    reasons = _table(out, k, with_hashes=True).column("reason").to_numpy(zero_copy_only=False)
    return np.asarray(reasons == "", np.bool_)


def _groups(
    out: Path, column: int, kept: list[NDArray[np.bool_]], part: int, n_parts: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Accepted rows of one part of the hashes, equal ones side by side, the first one first.

    Returns:
        int64 [n, 2], shard and row; int64 [groups + 1], where each group begins, and n.
    """
    hashes, places = [], []
    for k, mask in enumerate(kept):
        found = _hashes_of(out, k)[:, column]
        if column == NEAR:  # all pictures of one colour share a hash
            mask = mask & (np.bitwise_count(found) >= MIN_BITS)
        rows = np.flatnonzero(mask & (found % np.uint64(n_parts) == part))
        hashes.append(found[rows])
        places.append(np.stack([np.full(len(rows), k), rows], axis=1))
    flat = np.concatenate(hashes)
    order = np.argsort(flat, kind="stable")
    flat = flat[order]
    is_new = np.concatenate([[True], flat[1:] != flat[:-1], [True]])[: len(flat) + 1]
    starts = np.flatnonzero(is_new) if len(flat) else np.zeros(1, np.int64)
    return np.concatenate(places)[order], starts


def _repeats(
    out: Path, column: int, kept: list[NDArray[np.bool_]], part: int, n_parts: int
) -> NDArray[np.int64]:
    """Rows that repeat an earlier one: int64 [n, 4], their shard and row and those of the first."""
    where, starts = _groups(out, column, kept, part, n_parts)
    sizes = np.diff(starts)
    first = np.repeat(starts[:-1], sizes)
    later = np.flatnonzero(first != np.arange(len(where)))
    return np.concatenate([where[later], where[first[later]]], axis=1)


def _near(out: Path, kept: list[NDArray[np.bool_]], part: int, n_parts: int) -> dict[str, int]:
    """Accepted rows that share their perceptual hash, and how many such hashes there are."""
    _, starts = _groups(out, NEAR, kept, part, n_parts)
    sizes = np.diff(starts)
    return {"rows": int(sizes[sizes > 1].sum()), "pictures": int((sizes > 1).sum())}


def read_merged(plan: Plan) -> dict[str, Any]:
    """What ``merge`` returned.

    Raises:
        InputError: it is missing, damaged, or of another plan.
    """
    return _of_plan(plan, drops_path(plan.out))


def _of_plan(plan: Plan, path: Path) -> dict[str, Any]:
    content = read_held(path)
    if content.get("plan") != plan.hash:
        raise InputError(f"{path} belongs to another plan: delete {plan.out} and ingest again")
    return content


def read_drops(plan: Plan, k: int) -> dict[int, tuple[str, str]]:
    """Reason and detail of the rows of shard ``k`` that repeat others.

    Raises:
        InputError: the list is damaged, or of another plan.
    """
    n_dropped = read_merged(plan)["dropped"].get(f"{k:05d}", 0)
    if n_dropped == 0:
        return {}
    path = drops_path(plan.out, k)
    drops: list[tuple[int, str, str]] = _of_plan(plan, path)["drops"]
    if len(drops) != n_dropped:
        raise _damaged(path, f"{len(drops)} rows, there were {n_dropped}")
    return {row: (reason, detail) for row, reason, detail in drops}
