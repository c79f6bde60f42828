import os
import shutil
import signal
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest

from pipeline.console import InputError
from pipeline.data import commit, pread
from pipeline.data.schema import read_batch_table
from pipeline.data.shards import ShardReader
from tests.pipeline.data.helpers import edit, flip, pair_rows, token_rows, write
from tests.tiny import ROOT

ROWS = token_rows(45)
AGAIN = "data_prep.verify lists all damage; copy the shard again or prepare the set again"


# of strings: in none, in some and in all record batches they are known without a read
@pytest.fixture(params=[0, 200, pread.ENDS_BYTES], ids="offsets of {}".format)
def folder(request, tmp_path, monkeypatch):
    """45 rows in shards of 20, record batches of 8."""
    monkeypatch.setattr(pread, "ENDS_BYTES", request.param)
    monkeypatch.setattr(commit, "BATCH_ROWS", 8)
    write(tmp_path, "tokens", ROWS, 20)
    return tmp_path


def table(folder, k):
    reader = ShardReader(folder)
    described = {name: reader.manifest[name] for name in ("kind", "made_of")}
    return read_batch_table(folder, reader.manifest["shards"][k], described).tolist()


def check(reader, ids):
    ids = np.asarray(ids)
    tokens = reader.image_tokens(ids)
    np.testing.assert_array_equal(tokens, np.stack([ROWS[i]["image_tokens"] for i in ids]))
    assert reader.captions(ids) == [ROWS[i]["caption"] for i in ids]


@pytest.fixture
def reads(monkeypatch):
    """(size, offset) of every pread."""
    seen = []
    real = os.pread

    def spy(descriptor, size, at):
        seen.append((size, at))
        return real(descriptor, size, at)

    monkeypatch.setattr(os, "pread", spy)
    return seen


@pytest.mark.parametrize("are_kept", [False, True])
def test_a_record_batch_is_read_whole_once_and_then_row_by_row(
    folder, reads, monkeypatch, are_kept
):
    monkeypatch.setattr(pread, "ENDS_BYTES", 1000 if are_kept else 0)
    offsets = [] if are_kept else [8]
    reader = ShardReader(folder)
    reads.clear()
    (_, at, size, _), *_ = table(folder, 0)
    check(reader, [3])
    assert reads[0] == (size, at)
    assert [n for n, _ in reads[1:]] == [36, *offsets, len(ROWS[3]["caption"].encode())]
    reads.clear()
    check(reader, [5, 2])
    assert [n for n, _ in reads] == [36, 36, *offsets, 17, *offsets, 17]
    # neighbours together, up to the seam of two record batches
    reads.clear()
    reader.image_tokens(np.array([1, 2, 3]))
    assert [n for n, _ in reads] == [3 * 36]
    check(reader, range(45))
    reads.clear()
    reader.image_tokens(np.arange(45))
    assert [n for n, _ in reads] == [8 * 36, 8 * 36, 4 * 36, 8 * 36, 8 * 36, 4 * 36, 5 * 36]


def test_kept_offsets_take_the_bytes_they_may(folder, monkeypatch):
    # key and caption of a record batch of 8 rows: 9 offsets each, of 4 bytes
    monkeypatch.setattr(pread, "ENDS_BYTES", 3 * 72)
    reader = ShardReader(folder)
    check(reader, range(45))
    kept = reader._batches._ends
    assert list(kept) == [0, 8, 16]  # of 8, 8 and 4 rows; there is no room for 8 more
    path = folder / "shard-00000.arrow"
    os.utime(path, ns=(1, 1))
    check(reader, range(45))
    assert sum(ends.nbytes for of in kept.values() for ends in of.values()) <= 3 * 72


def test_rows_come_in_any_order_with_repeats(folder):
    reader = ShardReader(folder)
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 300):
        check(reader, rng.integers(0, 45, n))
    check(reader, [7, 7, 7, 0, 0])


def test_a_flipped_byte_names_shard_and_batch_and_spares_the_others(folder):
    path = folder / "shard-00001.arrow"
    _, at, size, crc = table(folder, 1)[2]
    flip(path, at + size - 7)
    found = zlib.crc32(path.read_bytes()[at : at + size])
    assert found != crc
    reader = ShardReader(folder)
    check(reader, [20, 30, 35, 41])
    with pytest.raises(InputError) as caught:
        reader.image_tokens(np.array([36]))
    assert str(caught.value) == (
        f"{path}, record batch 2: its bytes are not those that were written (crc32 {found:08x}); "
        + AGAIN
    )
    # again, and for every column
    for read in (reader.image_tokens, reader.captions, reader.keys):
        with pytest.raises(InputError, match=r"shard-00001\.arrow, record batch 2: its bytes"):
            read(np.array([0, 39]))
    with pytest.raises(InputError, match=r"shard-00001\.arrow, record batch 2: its bytes"):
        list(reader.batches(1))
    check(reader, [20, 35])


def test_every_byte_of_a_record_batch_is_guarded(folder):
    path = folder / "shard-00000.arrow"
    _, at, size, _ = table(folder, 0)[1]
    for place in {
        at,
        at + size - 1,
        *np.random.default_rng(0).integers(at, at + size, 40).tolist(),
    }:
        flip(path, place, place % 8)
        with pytest.raises(InputError, match="record batch 1: its bytes are not those"):
            ShardReader(folder)[8]
        flip(path, place, place % 8)
    check(ShardReader(folder), [8])


def test_a_file_that_changes_under_a_reader_is_checked_anew(folder, reads):
    reader = ShardReader(folder)
    check(reader, range(45))
    path = folder / "shard-00000.arrow"
    _, at, size, _ = table(folder, 0)[0]
    flip(path, at + size - 7)
    with pytest.raises(InputError, match=r"shard-00000\.arrow, record batch 0"):
        reader.captions(np.array([2]))
    flip(path, at + size - 7)
    check(reader, [2])
    # the same bytes as another file
    shutil.copy(path, folder / "copy")
    os.replace(folder / "copy", path)
    reads.clear()
    check(reader, [2, 25])
    assert [n for n in reads if n[0] == size] == [(size, at)]
    reads.clear()
    check(reader, [2, 25])
    assert not [n for n in reads if n[0] == size]


def test_a_file_that_is_cut_or_gone_under_a_reader_is_a_sentence(folder):
    reader = ShardReader(folder)
    check(reader, range(45))
    path = folder / "shard-00001.arrow"
    whole = path.read_bytes()
    os.truncate(path, 700)
    with pytest.raises(InputError, match=r"shard-00001\.arrow has 700 bytes, the manifest says"):
        reader.image_tokens(np.array([0, 25]))
    path.unlink()
    with pytest.raises(InputError, match=r"shard-00001\.arrow is missing: copy it again"):
        reader.image_tokens(np.array([25]))
    check(reader, [0, 44])
    path.write_bytes(whole)
    check(reader, range(45))


CUT = """
import os, sys
import numpy as np
from pipeline.console import InputError
from pipeline.data import pread
from pipeline.data.shards import ShardReader
folder = sys.argv[1]
reader = ShardReader(folder)
reader.image_tokens(np.arange(45))
# between the look at the file and the read of a row
look = pread.RecordBatches._look
def cut(self, k):
    found = look(self, k)
    os.truncate(self._paths[k], 1500)
    return found
pread.RecordBatches._look = cut
for read in (reader.image_tokens, reader.captions):
    try:
        read(np.array([38]))
    except InputError as error:
        print(error)
"""


def test_a_file_that_is_cut_during_a_read_is_no_bus_error(folder):
    command = [sys.executable, "-c", CUT, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != -signal.SIGBUS
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    where = f"{folder}/shard-00001.arrow, record batch 2: the file ends at byte "
    assert first.startswith(where)
    assert first.endswith(AGAIN)
    # the second look finds it before it reads
    assert "shard-00001.arrow has 1500 bytes, the manifest says" in second


def test_reads_that_give_less_at_a_time_are_gone_on_with(folder, monkeypatch):
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda d, size, at: real(d, min(size, 11), at))
    check(ShardReader(folder), range(45))


def test_a_disk_that_fails_is_a_sentence(folder, monkeypatch):
    real, fails = os.pread, [False]

    def pread_once(descriptor, size, at):
        if fails[0]:
            raise OSError(5, "Input/output error")
        return real(descriptor, size, at)

    monkeypatch.setattr(os, "pread", pread_once)
    reader = ShardReader(folder)
    check(reader, [3])
    fails[0] = True
    for row in (3, 30):
        for read in (reader.image_tokens, reader.captions):
            words = r"shard-0000\d\.arrow, record batch \d: it cannot be read \(Input/output error"
            with pytest.raises(InputError, match=words):
                read(np.array([row]))


def test_all_shards_that_are_missing_or_cut_are_counted_at_once(folder):
    os.truncate(folder / "shard-00000.arrow", 30)
    (folder / "shard-00002.arrow").unlink()
    words = r"shard-00000\.arrow has 30 bytes, .*\(1 more shards are damaged\)"
    with pytest.raises(InputError, match=words):
        ShardReader(folder)
    check(ShardReader(folder, lazy=True), [25])


def test_a_sidecar_of_another_set_is_refused(folder):
    edit(folder / "shard-00001.json", made_of={"grid": 4})
    reader = ShardReader(folder)
    check(reader, [0])
    with pytest.raises(InputError, match=r"shard-00001\.json has made_of {'grid': 4}"):
        reader[20]
    (folder / "shard-00001.json").unlink()
    with pytest.raises(InputError, match=r"shard-00001\.json cannot be read"):
        ShardReader(folder)[20]


def test_batches_that_the_sidecar_describes_wrongly_are_named(folder):
    batches = table(folder, 0)
    # as a whole they are right, so only the batch itself can tell
    rows = [[7, *batches[0][1:]], [9, *batches[1][1:]], batches[2]]
    edit(folder / "shard-00000.json", batches=rows)
    with pytest.raises(InputError, match="record batch 0: it has 8 rows, its sidecar says 7"):
        ShardReader(folder)[0]
    edit(folder / "shard-00000.json", batches=[[8, 0, 100, 1], *batches[1:]])
    with pytest.raises(InputError, match="record batch 0: its bytes are not those"):
        ShardReader(folder)[0]
    edit(folder / "shard-00000.json", batches=[[8, 0, 10**9, 1], *batches[1:]])
    with pytest.raises(InputError, match=r"record batch 0: the file ends at byte \d+, 10{9} was"):
        ShardReader(folder)[0]
    # bytes of another kind behind a right checksum
    path = folder / "shard-00000.arrow"
    crc = zlib.crc32(path.read_bytes()[:300])
    edit(folder / "shard-00000.json", batches=[[8, 0, 300, crc], *batches[1:]])
    with pytest.raises(InputError, match="record batch 0: Arrow cannot read it"):
        ShardReader(folder)[0]


def test_few_files_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pread, "MAX_OPEN", 4)
    write(tmp_path, "tokens", ROWS, 3)
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    for ids in (range(45), [44, 0, 20], np.random.default_rng(0).integers(0, 45, 90)):
        check(reader, ids)
        assert len(os.listdir("/proc/self/fd")) <= before + 4
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def test_held_batches_are_read_once_and_serve_all_columns(folder, reads):
    reader = ShardReader(folder, held_batches=3)
    reads.clear()
    sizes = [size for k in range(3) for _, _, size, _ in table(folder, k)]
    rng = np.random.default_rng(0)
    check(reader, [0, 3, 9, 17, 1, 7])
    assert [n for n, _ in reads] == sizes[:3]
    check(reader, [2, 10, 18])
    assert len(reads) == 3
    # the batch that was used longest ago goes
    check(reader, [4, 18, 25])
    assert [n for n, _ in reads[3:]] == [sizes[3]]
    check(reader, [18, 4])
    assert len(reads) == 4
    check(reader, [9])
    assert [n for n, _ in reads[4:]] == [sizes[1]]
    for _ in range(3):
        check(reader, rng.integers(0, 45, 60))
    assert len(reader._batches._held) <= 3


def test_held_batches_are_checked_too(folder):
    _, at, size, _ = table(folder, 0)[1]
    flip(folder / "shard-00000.arrow", at + size - 7)
    reader = ShardReader(folder, held_batches=2)
    check(reader, [0, 16])
    with pytest.raises(InputError, match="record batch 1: its bytes are not those"):
        reader.captions(np.array([8]))
    # and again when the file has changed
    flip(folder / "shard-00000.arrow", at + size - 7)
    check(reader, [0, 8, 16])
    _, at, size, _ = table(folder, 0)[2]
    flip(folder / "shard-00000.arrow", at + size - 7)
    with pytest.raises(InputError, match="record batch 2: its bytes are not those"):
        reader.captions(np.array([16]))


def test_whole_record_batches_come_in_order(folder):
    reader = ShardReader(folder)
    keys = [[b.column("key").to_pylist() for b in reader.batches(k)] for k in range(3)]
    assert [[len(part) for part in shard] for shard in keys] == [[8, 8, 4], [8, 8, 4], [5]]
    assert [key for shard in keys for part in shard for key in part] == [r["key"] for r in ROWS]


def test_threads_may_share_a_reader(folder, monkeypatch):
    monkeypatch.setattr(pread, "MAX_OPEN", 1)
    wrong = []

    def work(reader, seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(100):
                check(reader, rng.integers(0, 45, 5))
        except BaseException as error:
            wrong.append(error)

    for held in (0, 2):
        reader = ShardReader(folder, held_batches=held)
        threads = [threading.Thread(target=work, args=(reader, i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_empty_strings_and_pictures_come_back(tmp_path):
    rows = [row | {"caption": "", "image": b""} for row in pair_rows(3)]
    write(tmp_path, "pairs", rows)
    reader = ShardReader(tmp_path)
    assert reader.captions(np.array([2, 0, 1, 1])) == [""] * 4
    assert reader.images(np.arange(3)) == [b""] * 3
