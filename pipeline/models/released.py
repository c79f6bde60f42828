"""Reads the image tokenizer that OpenAI released, without running anything in its files.

``encoder.pkl`` and ``decoder.pkl`` (github.com/openai/DALL-E) are whole modules, pickled by another
version of torch from classes that are not here. torch's own weights-only reader takes such files in
the zip format only; ours takes those of before torch 1.6 too.
"""

import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from pipeline.console import InputError
from pipeline.models.unpickler import Machine, Module, Refused, Storage, View, of_kind

ZIP_START = b"PK\x03\x04"
LEGACY_START = (0x1950A86A20F9469CFC6C, 1001)  # the first two pickles of torch.save before 1.6
# the released ones take 30 kB, sources of classes more; one byte may take 64 of memory
MAX_PICKLE_BYTES = 1 << 18
MAX_TENSORS = 10_000  # the released ones hold 74
# what damaged bytes raise in pickletools, zipfile and torch
BROKEN = (
    Refused, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError, EOFError,
    MemoryError, zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True)
class Released:
    """One half of the tokenizer: where it was read, and tensors by their names in a state dict."""

    path: Path
    tensors: dict[str, Tensor]

    def shape(self, name: str) -> tuple[int, int, int, int]:
        """Of a convolution's weights.

        Raises:
            InputError: no tensor of that name and of four dimensions.
        """
        shape = tuple(self.tensors[name].shape) if name in self.tensors else ()
        if len(shape) != 4:
            raise InputError(
                f"{self.path} has no weights {name}; take the file that OpenAI released"
            )
        return shape


def read_released(path: str | Path, kind: str) -> Released:
    """The weights in a pickled ``dall_e`` module, from zip and older torch.save files alike.

    Args:
        path: encoder.pkl or decoder.pkl.
        kind: "Encoder" or "Decoder".

    Raises:
        InputError: no file there, no file of torch.save, a damaged one, names of other classes or
            functions in it, another module than ``kind``.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            read = _read_zip if file.read(len(ZIP_START)) == ZIP_START else _read_legacy
            file.seek(0)
            top, values = read(file, os.fstat(file.fileno()).st_size)
        held = type(top).__name__ if not isinstance(top, Module) else top.kind.rpartition(".")[2]
        if held != kind:
            raise InputError(f"{path} holds a {held}, and a dall_e {kind} is needed")
        return Released(path, _tensors(top, values))
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); name the {kind.lower()}.pkl"
        ) from error
    except BROKEN as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path} is not the {kind.lower()}.pkl that OpenAI released, or is damaged; nothing in "
            f"it was run ({reason})"
        ) from error


def _read_zip(file: IO[bytes], n_bytes: int) -> tuple[Any, dict[str, Tensor]]:
    """The value in a file of torch 1.6 or later, and its storages."""
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused(f"it has {len(pickles)} data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        order = root + "byteorder"
        if order in names and _member(archive, order, 16) != b"little":
            raise Refused("its numbers are big-endian")
        machine = Machine()
        top = machine.run(io.BytesIO(_member(archive, pickles[0], MAX_PICKLE_BYTES)))
        machine.check(n_bytes)
        return top, {
            key: _values(storage, _member(archive, f"{root}data/{key}", storage.n_bytes))
            for key, storage in machine.storages.items()
        }


def _member(archive: zipfile.ZipFile, name: str, at_most: int) -> bytes:
    """A member's bytes, none of them expanded: torch stores without compression."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise Refused(f"{name[:80]!r} is compressed")
    if info.file_size > at_most:
        raise Refused(f"{name[:80]!r} takes {info.file_size:,} bytes, at most {at_most:,} are due")
    return archive.read(info)


def _read_legacy(file: IO[bytes], n_bytes: int) -> tuple[Any, dict[str, Tensor]]:
    """The value in a file of an older torch, and its storages: five pickles, then the values."""
    head, machine = io.BytesIO(file.read(MAX_PICKLE_BYTES)), Machine()
    if (machine.run(head), machine.run(head)) != LEGACY_START:
        raise Refused("it does not start as a file of torch.save")
    machine.run(head)  # of the machine that wrote; values are little-endian whatever it says
    top, keys = machine.run(head), machine.run(head)
    if keys != sorted(machine.storages):
        raise Refused("it lists other weights than it names")
    machine.check(n_bytes)
    file.seek(head.tell())
    values = {}
    for key in keys:
        storage = machine.storages[key]
        if int.from_bytes(file.read(8), "little") != storage.n:
            raise Refused("its weights are not as long as it says")
        values[key] = _values(storage, file.read(storage.n_bytes))
    return top, values


def _values(storage: Storage, data: bytes) -> Tensor:
    if len(data) != storage.n_bytes:
        raise Refused(f"{len(data):,} of {storage.n_bytes:,} bytes of weights are there")
    return torch.frombuffer(bytearray(data), dtype=storage.dtype)


def _tensors(top: Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of ``top`` by their names in a state dict."""
    tensors: dict[str, Tensor] = {}
    n_left = sum(len(value) for value in values.values())
    todo, seen = [("", top)], {id(top)}
    while todo:
        prefix, module = todo.pop()
        for group in ("_parameters", "_buffers"):
            for name, view in of_kind(module.held.get(group, {}), dict).items():
                if not isinstance(view, View):
                    continue
                tensor = values[view.storage.key].as_strided(view.size, view.stride, view.offset)
                n_left -= tensor.numel()
                if n_left < 0 or len(tensors) == MAX_TENSORS:
                    raise Refused("its tensors are more than its weights")
                tensors[f"{prefix}{name}"] = tensor
        for name, child in of_kind(module.held.get("_modules", {}), dict).items():
            if isinstance(child, Module):
                if id(child) in seen:
                    raise Refused("a module stands in two places")
                seen.add(id(child))
                todo.append((f"{prefix}{name}.", child))
    return tensors
