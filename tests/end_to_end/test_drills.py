"""What a stranger sees who does the worst: the last lines of the commands, word for word."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end import kills

ROOT = Path(__file__).parent.parent.parent
NOISE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def write(folder, name, image, caption):
    folder.mkdir(parents=True, exist_ok=True)
    if image is not None:
        (folder / name).write_bytes(image)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_bytes(caption)


def one_of_everything_broken(folder):
    png, jpeg = encoded(NOISE), encoded(NOISE, "JPEG")
    turned = Image.Exif()
    turned[274] = 6
    write(folder, "good.jpg", jpeg, b"a field of coloured noise\n")
    write(folder, "turned.jpg", encoded(NOISE[::-1], "JPEG", exif=turned), b"noise on its side")
    write(folder, "again.jpg", jpeg, b"a field of coloured noise")
    write(folder, "cut.jpg", jpeg[: len(jpeg) // 2], b"a picture cut in half")
    write(folder, "page.jpg", b"<html>404</html>", b"a page instead of a picture")
    write(folder, "empty.png", b"", b"a picture without bytes")
    write(folder, "small.png", encoded(NOISE[:20]), b"a picture too small")
    write(folder, "long.png", encoded(np.tile(NOISE, (1, 3, 1))), b"a picture too long")
    write(folder, "mute.png", png, b"")
    write(folder, "short.png", png, b"noise")
    write(folder, "camera.png", png, b"IMG_1234 DSC 0001")
    write(folder, "date.png", png, b"photographed on 12 May 2008")
    write(folder, "foreign.png", png, b"ein Bild mit vielen bunten Punkten und Farben")
    write(folder, "latin1.png", png, b"caf\xe9 in the old town")
    write(folder, "orphan.png", png, None)
    write(folder, "widow.png", None, b"a caption without a picture")
    (folder / "gone.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    (folder / "no.tar").write_bytes(b"not an archive at all" * 100)
    with tarfile.open(folder / "half.tar", "w") as tar:
        for name, data in (("in.png", encoded(NOISE[:, ::-1])), ("in.txt", b"noise in a mirror")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    data = (folder / "half.tar").read_bytes()
    (folder / "half.tar").write_bytes(data[: len(data) - 10_240 + 512])


def run(*arguments, **options):
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def test_a_folder_with_one_of_everything_broken(tmp_path):
    one_of_everything_broken(tmp_path / "broken")
    out = tmp_path / "pairs"
    done = run("data_prep.ingest", tmp_path / "broken", "--out", out, "--image-size", "32")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "tests/end_to_end/golden/broken.txt").read_text()
    checked = run("data_prep.verify", out)
    assert checked.returncode == 0, checked.stderr
    assert " rows of pairs in 1 shards, every byte as written" in checked.stderr
    (out / "shard-00000.arrow").write_bytes(
        (out / "shard-00000.arrow").read_bytes().replace(b"coloured", b"c0loured")
    )
    checked = run("data_prep.verify", out)
    assert checked.returncode == 2
    assert checked.stderr.splitlines()[-1].startswith(
        f"error: {out}: 1 of 1 shards are damaged: shard-00000.arrow"
    )


@pytest.mark.dist
def test_a_killed_job(tmp_path):
    kills.make_source(tmp_path / "in", n=200)
    out = tmp_path / "pairs"
    job = kills.start(kills.ingest(tmp_path / "in", out), 1)
    end = time.monotonic() + 120
    while len(list((out / "plan" / "facts").glob("*.arrow"))) < 2:
        assert time.monotonic() < end
        assert job.poll() is None
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    n_shards = len(list((out / "plan").glob("0*.json")))
    # half a set is no set
    done = run("data_prep.train_tokenizer", "--data", out, "--out", tmp_path / "tokenizer")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {out}/manifest.json cannot be read (No such file or directory): did the command "
        "that writes it finish?"
    )
    n_done = len(list((out / "plan" / "facts").glob("*.arrow")))
    again = run(*kills.ingest(tmp_path / "in", out), "--workers", "1")
    assert again.returncode == 0, again.stderr
    assert f"inspect: {n_done} of {n_shards} shards are done already" in again.stderr
    assert again.stdout == (ROOT / "tests/end_to_end/golden/killed.txt").read_text()
    calm = run(*kills.ingest(tmp_path / "in", tmp_path / "calm"), "--workers", "1")
    assert calm.stdout == again.stdout
    assert kills.digests(out) == kills.digests(tmp_path / "calm")


def can_mount():
    if shutil.which("unshare") is None:
        return False
    line = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    return subprocess.run(line, capture_output=True, check=False).returncode == 0


@pytest.mark.dist
@pytest.mark.parametrize("way", ["disk", "limit"])
def test_a_full_disk(tmp_path, way):
    if way == "disk" and not can_mount():
        pytest.skip("this machine lets nobody mount a small disk")
    kills.make_source(tmp_path / "in", n=100)
    out = tmp_path / "disk" / "pairs"
    out.parent.mkdir()
    command = [sys.executable, "-m", *kills.ingest(tmp_path / "in", out), "--workers", "1"]
    command += ["--rows-per-shard", "1000"]
    job = " ".join(command)
    if way == "disk":
        script = (
            f"mount -t tmpfs -o size=300k tmpfs {out.parent} && {job}; echo code $?; "
            f"find {out.parent} -name '*.tmp' | wc -l; "
            f"mount -o remount,size=100m {out.parent} && {job}; echo code $?; "
            f"cp -r {out} {tmp_path}/saved"
        )
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        said = "No space left on device; make room and start again: what is committed stays"
        saved = tmp_path / "saved"
    else:
        script = f"(ulimit -f 150; {job}); echo code $?; find {out.parent} -name '*.tmp' | wc -l; "
        script += f"{job}; echo code $?"
        done = subprocess.run(
            ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
        )
        said = "File too large; raise ulimit -f and start again: what is committed stays"
        saved = out
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert errors[0] == f"error: {out}/shard-00000.arrow: {said}"
    lines = done.stdout.splitlines()
    assert lines[:2] == ["code 2", "0"]
    assert lines[-1] == "code 0"
    calm = [*kills.ingest(tmp_path / "in", tmp_path / "calm"), "--rows-per-shard", "1000"]
    assert run(*calm, "--workers", "1").returncode == 0
    assert kills.digests(saved) == kills.digests(tmp_path / "calm")
