"""COCO captions: a JSON of ``images`` and ``annotations``, and a folder of pictures.

A row is a caption; its key is "<image id>-<n>", where n counts the captions of the picture in the
order of their own ids, and all captions of a picture are one group. A picture that has none is a
row too, "caption missing". Rows are ordered by the ids of picture and caption. The JSON is parsed
once a process.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data_prep.sources.rows import (
    Piece,
    RawPair,
    Source,
    broken,
    check_unit,
    pair_by_path,
    paths_in,
)
from pipeline.console import InputError
from pipeline.data.places import Place

Id = tuple[int, int, str]  # sorts; the last is how it is written


@dataclass(frozen=True, slots=True)
class Caption:
    """A row before its picture is looked for; ``problem`` is "" or says why it cannot be."""

    key: str
    file: str
    text: str | None
    problem: str = ""
    detail: str = ""


class CocoSource(Source):
    """A ``.json`` of captions with the folder ``images`` of its pictures."""

    kind = "coco"
    can_refer = True

    def __init__(self, captions: Place, images: Place) -> None:
        self.uri, self.name, self.place = captions.uri, captions.name, images
        self._folder = captions.parent

    def pieces(self, max_rows: int) -> Iterator[Piece]:
        """Ranges of the captions, counted in rows."""
        size = self._folder.size(self.name)
        n_rows = len(_captions(self.uri, size))
        for start in range(0, n_rows, max_rows):
            stop = min(start + max_rows, n_rows)
            n_bytes = size * stop // n_rows - size * start // n_rows
            yield Piece(self.name, start, stop, n_bytes, stop - start, ((self.name, size),))

    def rows(self, piece: Piece) -> Iterator[RawPair]:
        """The rows of a piece."""
        check_unit(self._folder, piece)
        size = piece.files[0][1]
        captions = _captions(self.uri, size)
        for i in range(piece.start, piece.stop):
            caption = captions[i]
            n_bytes = size * (i + 1) // len(captions) - size * i // len(captions)
            if caption.problem:
                yield broken(caption.key, caption.problem, caption.detail, n_bytes)
                continue
            text = None if caption.text is None else caption.text.encode(errors="surrogatepass")
            files = paths_in(self.place, caption.file)
            yield pair_by_path(self.place, caption.key, text, files, n_bytes)


@lru_cache(maxsize=2)
def _captions(uri: str, size: int) -> list[Caption]:
    """The rows of a JSON of ``size`` bytes, in order.

    Raises:
        InputError: it is no JSON of COCO captions.
    """
    try:
        content = json.loads(Place(uri).read("", 0, size))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{uri} is no JSON: {error}") from error
    content = content if isinstance(content, dict) else {}
    images, notes = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(notes, list):
        raise InputError(
            f"{uri} is no JSON of COCO captions: it has no list of images, or none of annotations"
        )
    if not any(isinstance(note, dict) and "caption" in note for note in notes):
        raise InputError(f"{uri} has no captions: of COCO, take captions_*.json")
    return [*_rows(images, notes)]


def _rows(images: list[Any], notes: list[Any]) -> Iterator[Caption]:
    """Rows by picture, then by caption; last what belongs to no picture."""
    files: dict[Id, list[str]] = {}
    odd = []
    for n, image in enumerate(images):
        if isinstance(image, dict) and "id" in image and isinstance(image.get("file_name"), str):
            files.setdefault(_id(image["id"]), []).append(image["file_name"])
        else:
            detail = "it has no id or no file_name"
            odd.append(Caption(f"images[{n}]", "", None, "image missing", detail))
    captions: dict[Id, list[tuple[Id, Any]]] = {image: [] for image in files}
    for n, note in enumerate(notes):
        if isinstance(note, dict) and "image_id" in note:
            found = captions.setdefault(_id(note["image_id"]), [])
            found.append((_id(note.get("id", n)), note.get("caption")))
        else:
            detail = "it has no image_id"
            odd.append(Caption(f"annotations[{n}]", "", None, "image missing", detail))
    for image in sorted(captions):
        # sorting is stable: captions of one id stay as they are in the file
        of_image = sorted(captions[image], key=lambda note: note[0])
        names = sorted(set(files.get(image, [])))
        problem, detail = "", ""
        if not names:
            problem, detail = "image missing", "its id is not among the images"
        elif len(names) > 1:
            problem, detail = "several images of one name", f"one id for {' and '.join(names)}"
        for n, (_, text) in enumerate(of_image or [(image, None)]):
            text = text if isinstance(text, str) else None
            yield Caption(f"{image[2]}-{n}", (names or [""])[0], text, problem, detail)
    yield from odd


def _id(value: Any) -> Id:
    """An id of the JSON: numbers sort before all else."""
    if isinstance(value, int):
        return 0, int(value), str(int(value))
    return 1, 0, str(value)
