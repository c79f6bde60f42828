"""Which columns of a Parquet table are pictures, captions and keys.

Columns, by name and type:

    picture   ``image`` or img2dataset's ``jpg``, ``jpeg``, ``png``, ``webp``: bytes; Hugging Face's
              struct {bytes, path} (under any name, when it is the only one); or the path of a file,
              also as ``path``, ``file``, ``file_name``, ``filename``, ``filepath``, ``image_path``
    caption   ``caption``, ``text``, ``captions`` or ``txt``: text; a list of texts makes a row of
              each, of one group
    key       ``key``, ``__key__`` or ``id``: text or whole numbers; else, and where it is null, the
              path of the table and the number of the row
"""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

BYTES_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
PATH_COLUMNS = ("image", "path", "file", "file_name", "filename", "filepath", "image_path")
CAPTION_COLUMNS = ("caption", "text", "captions", "txt")
KEY_COLUMNS = ("key", "__key__", "id")
METADATA_COLUMNS = {"status", "error_message"}  # img2dataset writes them beside its archives


class NoTable(Exception):
    """A file that is no table of pictures and captions; ``detail`` says why.

    ``is_metadata``: it is what img2dataset knows of the pictures that lie elsewhere.
    """

    def __init__(self, detail: str, is_metadata: bool = False) -> None:
        super().__init__(detail)
        self.detail = detail
        self.is_metadata = is_metadata


@dataclass(frozen=True)
class Layout:
    """Which columns are what. ``image_type`` is "bytes", "struct" or "path"; ``key`` may be ""."""

    image: str
    image_type: str
    caption: str
    key: str


def layout_of(schema: pa.Schema) -> Layout:
    """Which columns are the picture, the caption and the key."""
    fields = {field.name: _value_type(field.type) for field in schema}
    caption = _first(fields, CAPTION_COLUMNS, _is_caption)
    key = _first(fields, KEY_COLUMNS, lambda t: _is_text(t) or pa.types.is_integer(t))
    structs = [name for name, kind in fields.items() if _is_picture(kind)]
    if image := _first(fields, BYTES_COLUMNS, _is_bytes):
        image_type = "bytes"
    elif image := "image" if "image" in structs else structs[0] if len(structs) == 1 else "":
        image_type = "struct"
    else:
        image, image_type = _first(fields, PATH_COLUMNS, _is_text), "path"
    names = ", ".join(schema.names)
    if not image or not caption:
        kind = "caption (caption, text)" if image else "pictures (image, jpg, path)"
        is_metadata = not image and set(schema.names) >= METADATA_COLUMNS
        raise NoTable(f"no column of {kind} is among {names}", is_metadata)
    if len(set(schema.names)) < len(schema.names):
        raise NoTable(f"two columns have one name: {names}")
    return Layout(image, image_type, caption, key)


def has_paths(file: pq.ParquetFile, layout: Layout) -> bool:
    """Whether pictures are named by path; of structs, whether none has bytes."""
    if layout.image_type != "struct":
        return layout.image_type == "path"
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema == f"{layout.image}.bytes":
                statistics = column.statistics
                if statistics is None or statistics.null_count != group.num_rows:
                    return False
    return True


def _first(
    fields: dict[str, pa.DataType], names: tuple[str, ...], fits: Callable[[pa.DataType], bool]
) -> str:
    return next((name for name in names if name in fields and fits(fields[name])), "")


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_caption(kind: pa.DataType) -> bool:
    return _is_text(kind) or (_is_list(kind) and _is_text(kind.value_type))


def _is_picture(kind: pa.DataType) -> bool:
    """Whether it is the struct {bytes, path}."""
    if not pa.types.is_struct(kind) or kind.num_fields != 2:
        return False
    if {kind.field(i).name for i in range(2)} != {"bytes", "path"}:
        return False
    return _is_bytes(kind.field("bytes").type) and _is_text(kind.field("path").type)


def without_text(column: pa.Array) -> pa.Array:
    """Texts as bytes, so that what is not UTF-8 is a matter of one row."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        return column.cast(pa.binary())
    if _is_list(column.type):
        return column.cast(pa.list_(pa.binary()))
    return column
