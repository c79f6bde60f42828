import os
import pickle

import pytest
from pyarrow import fs

from pipeline.console import InputError
from pipeline.data import places
from pipeline.data.listing import DEPTH_LIMIT, FileInfo
from pipeline.data.places import FileProblem, Place
from tests.pipeline.data.s3_server import s3_server


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


def test_uris(server):
    place = Place("s3://bucket/a/b%20%23/c.tar/?region=r")
    assert (place.uri, place.name) == ("s3://bucket/a/b%20%23/c.tar?region=r", "c.tar")
    assert place.parent.uri == "s3://bucket/a/b%20%23?region=r"
    assert place.parent.parent.parent.uri == "s3://bucket?region=r"
    assert Place("gs://bucket").name == "bucket"
    assert not place.is_local
    assert pickle.loads(pickle.dumps(place)).uri == place.uri


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("http://host/a", "http:// is not known"),
        ("s3://key:secret@bucket/a", "carries credentials"),
        ("s3:///a", "is no URI of a bucket"),
        ("s3://bucket/a b", "with %20 for a space"),
        ("s3://bucket/a#b", "%23 for a #"),
        ("s3://[/a", "is no URI"),
    ],
)
def test_uris_that_will_not_do(uri, error):
    with pytest.raises(InputError, match=error) as caught:
        Place(uri)
    assert "secret" not in str(caught.value)


def test_an_option_that_is_none_is_an_input_error():
    with pytest.raises(InputError, match=r"bucket/a\?regoin=x is no URI of a bucket.*regoin"):
        Place("s3://bucket/a?regoin=x").read()


def test_what_is_in_a_bucket(server):
    data = os.urandom(3 << 20)
    server.put("in/a.jpg", data)
    server.put("in/é ?.jpg", b"odd")
    place = Place(server.uri("in"))
    assert place.exists()
    assert place.is_folder()
    assert not Place(server.uri("in/a.jpg")).is_folder()
    assert not Place(server.uri("nowhere")).exists()
    assert place.size("a.jpg") == len(data)
    assert place.read("a.jpg") == data == Place(server.uri("in/a.jpg")).read()
    assert place.read("a.jpg", 1000, 7) == data[1000:1007]
    assert place.read("é ?.jpg") == b"odd" == Place(server.uri("in/é ?.jpg")).read()
    with place.open("a.jpg") as file:
        assert file.read(10) == data[:10]
        file.seek(-5, os.SEEK_END)
        assert file.read() == data[-5:]
    with place.local("a.jpg") as path:
        assert path.read_bytes() == data
    assert not path.exists()


def test_a_bucket_for_everybody(server):
    server.put("public/a.jpg", b"i")
    server.put("public/b.jpg", b"i", acl="private")
    place = Place(f"{server.uri('public')}&anonymous=true")
    assert place.read("a.jpg") == b"i"
    assert place.parent.read("public/a.jpg") == b"i"
    assert Place(server.uri("public")).read("b.jpg") == b"i"
    with pytest.raises(InputError, match=r"b\.jpg: access denied"):  # the credentials stay at home
        place.read("b.jpg")


def test_files_are_listed_as_on_a_disk(server, tmp_path):
    names = ["b.png", "b.txt", "b-c.png", "b/a.png", "b/.hidden.png", ".b/x.png", "B/z.y/a", "é"]
    for n, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(bytes(n))
    server.put_folder(tmp_path, "list")
    server.put("list/marker/", b"")
    found = list(Place(server.uri("list")).files())
    assert found == list(Place(tmp_path).files())
    assert len(found) == 6
    assert list(Place(server.uri("list/b.txt")).files()) == [FileInfo("", 1)]
    with pytest.raises(InputError, match=r"nowhere does not exist|nowhere\?.* does not exist"):
        list(Place(server.uri("nowhere")).files())


def test_names_that_no_folder_could_have(server):
    server.put("odd/a.png", b"i")
    server.put("odd/c//d.png", b"i")
    server.put("odd//e.png", b"i")
    server.put("odd/" + "d/" * (DEPTH_LIMIT + 1) + "a.png", b"i")
    found = {info.path: info.problem for info in Place(server.uri("odd")).files()}
    assert found == {
        "a.png": None,
        "/": "folder cannot be read",
        "c//": "folder cannot be read",
        "d/" * DEPTH_LIMIT: "folder cannot be read",
    }


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("no.png", "missing"),
        ("a.png/b", "missing"),
        ("a//b.png", "missing"),
        ("half\ud800.png", "missing"),
        ("../in/a.jpg", "escapes"),
    ],
)
def test_what_cannot_be_read_is_named(server, file, problem):
    server.put("some/a.png", b"i")
    with pytest.raises(FileProblem, match="some") as caught:
        Place(server.uri("some")).read(file)
    assert caught.value.problem == problem
    with pytest.raises(InputError, match=r"gone.*does not exist: bring it back") as gone:
        Place(server.uri("gone")).read("a.png")
    assert not isinstance(gone.value, FileProblem)


class Flaky:
    """A file system whose calls fail ``n`` times first."""

    def __init__(self, real, n, error):
        self.real, self.left, self.error, self.calls = real, n, error, 0

    def __getattr__(self, name):
        def call(*args):
            self.calls += 1
            if self.left:
                self.left -= 1
                raise self.error
            return getattr(self.real, name)(*args)

        return call


@pytest.fixture
def pauses(monkeypatch):
    slept = []
    monkeypatch.setattr(places.time, "sleep", slept.append)
    return slept


def flaky(place, n, error):
    bucket = place._bucket
    bucket._fs = Flaky(bucket.fs, n, error)
    return bucket._fs


NETWORK = OSError("When reading: AWS Error NETWORK_CONNECTION during HeadObject: curlCode: 7")


def test_what_passes_is_tried_again_with_growing_pauses(server, pauses):
    server.put("flaky/a.png", b"i")
    place = Place(server.uri("flaky"))
    flaky(place, 3, NETWORK)
    assert place.read("a.png") == b"i"
    assert pauses == [1.0, 4.0, 16.0]


def test_what_does_not_pass_is_a_sentence(server, pauses):
    place = Place(server.uri("flaky"))
    calls = flaky(place, 99, NETWORK)
    with pytest.raises(InputError) as caught:
        place.read("a.png")
    assert not isinstance(caught.value, FileProblem)
    assert str(caught.value) == (
        f"{place.uri}, file a.png cannot be reached after 4 tries: look after the network and the "
        f"server, then start again ({NETWORK})"
    )
    assert calls.calls == 4


def test_a_door_that_is_closed_is_tried_once(server, pauses):
    place = Place(server.uri("flaky"))
    calls = flaky(place, 99, OSError("AWS Error ACCESS_DENIED during HeadObject operation"))
    with pytest.raises(InputError, match=r"file a\.png: access denied; set the credentials"):
        place.read("a.png")
    assert (calls.calls, pauses) == (1, [])


def test_reading_goes_on_where_it_broke_off(server, pauses):
    data = os.urandom(5000)
    server.put("flaky/b.bin", data)
    place = Place(server.uri("flaky"))
    with place.open("b.bin") as file:
        assert file.read(100) == data[:100]
        file.raw._remote = Flaky(file.raw._remote, 2, NETWORK)
        file.seek(1)
        file.raw.seek(1000)
        assert file.raw.read(4000) == data[1000:]
    assert pauses == [1.0, 4.0]


def test_a_file_that_changes_while_it_is_copied(server, monkeypatch):
    server.put("copy/a.tar", b"old" * 100)
    place = Place(server.uri("copy"))

    def copied(source, target, chunk):
        server.put("copy/a.tar", b"new" * 100)

    # S3 tells times in whole seconds
    versions = iter([(300, 1), (300, 2)])
    monkeypatch.setattr(type(place._bucket), "version", lambda self, path: next(versions))
    with (
        pytest.raises(FileProblem, match=r"a\.tar: it changed while it was copied"),
        place.local("a.tar"),
    ):
        pass


def test_the_version_of_a_file_is_its_size_and_time(server):
    server.put("copy/b.tar", b"1234")
    size, time_ns = Place(server.uri("copy"))._bucket.version("bucket/copy/b.tar")
    assert size == 4
    assert time_ns > 1e18


def test_folders_of_gcs_are_made_of_names(tmp_path):
    names = ["b.png", "b.txt", "b-c.png", "b/a.png", "b/c/d/e.png", ".b/x.png", "c/d/e.png", "c/a"]
    for n, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(bytes(n))

    class Gcs:
        """Lists as pyarrow's GcsFileSystem does: folders only where an object marks them."""

        def get_file_info(self, what):
            if isinstance(what, str):
                return fs.FileInfo(what, fs.FileType.Directory)
            assert what.recursive
            marker = fs.FileInfo("bucket/in/marker", fs.FileType.Directory)
            odd = fs.FileInfo("bucket/in/x//y.png", fs.FileType.File, size=1)
            found = [(f"bucket/in/{name}", n) for n, name in enumerate(names)]
            return [marker, odd, *(fs.FileInfo(p, fs.FileType.File, size=n) for p, n in found)]

    place = Place("gs://bucket/in")
    place._bucket._fs, place._bucket._process = Gcs(), os.getpid()
    problem = "names with two slashes cannot be read: rename them"
    assert list(place.files()) == [
        *Place(tmp_path).files(),
        FileInfo("x//", problem="folder cannot be read", detail=problem),
    ]
