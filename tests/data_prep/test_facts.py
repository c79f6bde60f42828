"""Rows that repeat others: against a walk through all rows in order."""

from dataclasses import replace

import numpy as np
import pytest

from data_prep import facts as facts_module
from data_prep.check import Fact
from data_prep.facts import (
    drops_path,
    facts_path,
    merge,
    read_drops,
    read_facts,
    read_merged,
    write_facts,
)
from data_prep.hashes import is_telling
from data_prep.plan import Plan, Settings
from pipeline.console import InputError


def plan_of(out, n_shards, **changes):
    settings = replace(Settings(), **changes)
    return Plan(out, (), settings, ("in",), ("",) * n_shards, (0,) * n_shards, "a plan")


def random_shards(seed, n_shards=4, n_rows=90):
    """Facts whose keys, captions, pictures and perceptual hashes collide often."""
    rng = np.random.default_rng(seed)
    return [
        [
            Fact(
                key=f"key {rng.integers(150)}",
                reason="empty file" if rng.random() < 0.2 else "",
                caption=f"caption {rng.integers(3)}",
                image_sha=bytes([rng.integers(40)]) * 16,
                # numbers that do not fit 63 bits, or say nothing
                phash=(1 << 64) - 1 - int(rng.integers(20)) if rng.random() < 0.8 else 1,
                notes=("cmyk",) if rng.random() < 0.5 else (),
            )
            for _ in range(rng.integers(n_rows // 2, n_rows))
        ]
        for _ in range(n_shards)
    ]


def walk(shards, duplicates, near_duplicates):
    """What goes, kind by kind: {(shard, row): (reason, detail)}."""
    drops = {}
    kinds = [("duplicate key", lambda f: f.key)]
    if duplicates == "pair":
        kinds.append(("duplicate picture and caption", lambda f: (f.image_sha, f.caption)))
    if duplicates == "image":
        kinds.append(("duplicate picture", lambda f: f.image_sha))
    if near_duplicates == "drop":
        kinds.append(("near-duplicate picture", lambda f: f.phash))
    for reason, identity in kinds:
        seen = {}
        for k, facts in enumerate(shards):
            for row, fact in enumerate(facts):
                if fact.reason or (k, row) in drops:
                    continue
                if reason.startswith("near") and not is_telling(fact.phash):
                    continue
                if identity(fact) in seen:
                    drops[k, row] = (reason, f"the same as {seen[identity(fact)]!r}")
                else:
                    seen[identity(fact)] = fact.key
    return drops


@pytest.mark.parametrize("part", [1 << 25, 13])
@pytest.mark.parametrize("duplicates", ["pair", "image", "off"])
@pytest.mark.parametrize("near_duplicates", ["report", "drop", "off"])
def test_the_first_of_equal_rows_stays(tmp_path, monkeypatch, part, duplicates, near_duplicates):
    monkeypatch.setattr(facts_module, "PART", part)
    plan = plan_of(tmp_path, 4, duplicates=duplicates, near_duplicates=near_duplicates)
    shards = random_shards(seed=len(duplicates) + part % 7)
    for k, facts in enumerate(shards):
        write_facts(tmp_path, k, facts)
    summary = merge(plan)
    expected = walk(shards, duplicates, near_duplicates)
    assert len(expected) > 20
    found = {(k, row): drop for k in range(4) for row, drop in read_drops(plan, k).items()}
    assert found == expected
    n_good = sum(not fact.reason for facts in shards for fact in facts)
    assert summary["accepted"] == n_good - len(expected)
    hashes = [
        fact.phash
        for k, facts in enumerate(shards)
        for row, fact in enumerate(facts)
        if not fact.reason and (k, row) not in expected and is_telling(fact.phash)
    ]
    shared = [h for h in set(hashes) if hashes.count(h) > 1]
    near = {"rows": sum(map(hashes.count, shared)), "pictures": len(shared)}
    assert summary["near"] == ({} if near_duplicates == "off" else near)
    assert read_merged(plan) == summary


def test_facts_come_back_as_they_were(tmp_path):
    shards = random_shards(seed=1)
    shards[2] = []
    for k, facts in enumerate(shards):
        write_facts(tmp_path, k, facts)
    assert [list(read_facts(tmp_path, k)) for k in range(4)] == shards
    merge(plan_of(tmp_path, 4))


def test_nothing_but_empty_shards(tmp_path):
    for k in range(2):
        write_facts(tmp_path, k, [])
    assert merge(plan_of(tmp_path, 2))["accepted"] == 0


def test_damage_is_a_sentence(tmp_path):
    plan = plan_of(tmp_path, 1)
    write_facts(tmp_path, 0, random_shards(seed=3, n_shards=1)[0])
    whole = facts_path(tmp_path, 0).read_bytes()
    facts_path(tmp_path, 0).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"is missing or damaged .*: delete .*/facts and"):
        list(read_facts(tmp_path, 0))
    at = whole.index(b"caption 1")  # Arrow would not mind another
    facts_path(tmp_path, 0).write_bytes(whole[:at] + b"C" + whole[at + 1 :])
    with pytest.raises(InputError, match=r"damaged \(its crc32 is another\)"):
        list(read_facts(tmp_path, 0))
    facts_path(tmp_path, 0).write_bytes(whole)
    path = facts_path(tmp_path, 0).with_suffix(".npy")
    hashes = path.read_bytes()
    for damage in (
        b"",
        hashes[:-1] + bytes([hashes[-1] ^ 1]),
        hashes[:200] + bytes(len(hashes) - 200),
    ):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=r"00000\.npy is missing or damaged"):
            merge(plan)


def test_damage_to_a_drop_list_is_a_sentence(tmp_path):
    plan = plan_of(tmp_path, 2)
    for k in range(2):
        write_facts(tmp_path, k, [Fact("a", image_sha=bytes(16)), Fact("b", image_sha=bytes(16))])
    merge(plan)
    drops, merged = drops_path(tmp_path, 1), drops_path(tmp_path)
    assert sorted(read_drops(plan, 1)) == [0, 1]
    for path in (drops, merged):
        whole = path.read_text()
        for damage in (whole.replace("1", "0", 1), "{}", "[5]", "{", "[" * 100_000):
            path.write_text(damage)
            with pytest.raises(InputError, match=rf"{path.name} is missing or damaged"):
                read_drops(plan, 1)
        path.write_text(whole)
    drops.unlink()
    with pytest.raises(InputError, match=r"00001\.drops\.json is missing or damaged"):
        read_drops(plan, 1)


def test_a_drop_list_of_another_plan_is_refused(tmp_path):
    write_facts(tmp_path, 0, [Fact("a", image_sha=bytes(16)), Fact("a", image_sha=bytes(16))])
    plan = plan_of(tmp_path, 1)
    merge(plan)
    assert read_drops(plan, 0) == {1: ("duplicate key", "the same as 'a'")}
    with pytest.raises(InputError, match="belongs to another plan"):
        read_drops(replace(plan, hash="another"), 0)
