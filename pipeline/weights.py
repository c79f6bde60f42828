"""Finished weights: safetensors files, and a ``model.json`` that says what they are.

    model.json                          schema version, kind and config of the model, sha256 of the
                                        files, fingerprints of what made them
    model.safetensors                   or, of a large model,
    model-00001-of-00010.safetensors .. and model.safetensors.index.json, as other libraries read it

They are written tensor by tensor, so that whoever writes them never holds more than one. Nothing is
unpickled. A folder of a run that is not finished is read too: the average in its newest checkpoint.
"""

import hashlib
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import slices
from pipeline.console import InputError
from pipeline.files import filling, json_bytes, write_json

Config = TypeVar("Config")

SCHEMA_VERSION = 2
FILE_BYTES = 5 << 30  # of one file, about
ONE_FILE = "model.safetensors"
OWN_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json|\.tmp)?")
# names of types in the header of safetensors
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


@dataclass(frozen=True)
class Entry:
    """A tensor that is made when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Artifact:
    """What ``load_weights`` found in a folder."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    made_of: dict[str, Any]
    fingerprint: str

    def config_as(self, kind: type[Config]) -> Config:
        """The config as a dataclass; it must have the fields that this code knows."""
        try:
            return kind(**self.config)
        except TypeError as error:
            raise InputError(
                f"{self.folder / 'model.json'} has a config that this code cannot read: {error}; "
                "copy or export the model again"
            ) from error

    def fill(self, model: nn.Module) -> None:
        """Copy the tensors into ``model``; every name and shape must fit."""
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in self.tensors.items()}
        if wanted != found:
            name = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
            raise InputError(
                f"{self.folder}: the weights do not fit their config: {name} is {found.get(name)} "
                f"in the file and {wanted.get(name)} in the model; export the model again"
            )
        model.load_state_dict(self.tensors)


# ---- writing


def save_weights(
    folder: str | Path,
    kind: str,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor | Entry],
    made_of: dict[str, Any],
    file_bytes: int = FILE_BYTES,
) -> str:
    """Write weights and their description; returns the fingerprint of the weights.

    Args:
        folder: made when missing; an older model in it is replaced.
        kind: "dvae", "dalle" or "clip".
        config: what builds the model, as JSON.
        tensors: the whole state dict.
        made_of: fingerprints of data, tokenizer, dVAE and what else it depends on.
        file_bytes: of one file, about; what is larger goes into several.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {name: _entry(value) for name, value in tensors.items()}
    parts = _divided(entries, file_bytes)
    names = [ONE_FILE]
    if len(parts) > 1:
        names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    # until the description is there again, the folder holds no model
    (folder / "model.json").unlink(missing_ok=True)
    files = {
        name: write_safetensors(folder / name, part)
        for name, part in zip(names, parts, strict=True)
    }
    for old in folder.glob("model*.safetensors*"):
        if old.name not in files and OWN_FILE.fullmatch(old.name):
            old.unlink()
    if len(parts) > 1:
        where = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        total = sum(entry.nbytes for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(folder / f"{ONE_FILE}.index.json", index)
    description = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "config": config,
        "files": files,
        "made_of": made_of,
    }
    write_json(folder / "model.json", description | {"crc32": _crc(description)})
    return fingerprint_of(files)


def _crc(description: dict[str, Any]) -> str:
    return f"{zlib.crc32(json_bytes(description)):08x}"


def _entry(value: Tensor | Entry) -> Entry:
    if isinstance(value, Entry):
        return value
    return Entry(value.dtype, tuple(value.shape), lambda: value)


def _divided(entries: dict[str, Entry], file_bytes: int) -> list[dict[str, Entry]]:
    parts: list[dict[str, Entry]] = [{}]
    left = file_bytes
    for name, entry in entries.items():
        if parts[-1] and entry.nbytes > left:
            parts.append({})
            left = file_bytes
        parts[-1][name] = entry
        left -= entry.nbytes
    return parts


def fingerprint_of(files: dict[str, str]) -> str:
    """16 hexadecimal digits that stand for weights, from the sha256 of their files."""
    digests = list(files.values())
    if len(digests) == 1:
        return digests[0][:16]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def write_safetensors(path: Path, entries: dict[str, Entry]) -> str:
    """Write a safetensors file, tensor by tensor; returns its sha256.

    The format: eight bytes with the length of a JSON header, the header, the bytes of the tensors.
    The file has its name when it is complete.
    """
    header, at = {}, 0
    for name, entry in entries.items():
        span = [at, at + entry.nbytes]
        header[name] = {
            "dtype": TYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": span,
        }  # fmt: skip
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary, digest = path.with_name(path.name + ".tmp"), hashlib.sha256()
    try:
        with filling(path), open(temporary, "wb") as file:

            def write(data: Any) -> None:
                digest.update(data)
                file.write(data)

            write(struct.pack("<Q", len(text)) + text)
            for name, entry in entries.items():
                value = entry.read().detach().cpu().contiguous()
                if (value.dtype, tuple(value.shape)) != (entry.dtype, entry.shape):
                    raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, not {entry}")
                if value.numel():
                    write(value.view(-1).view(torch.uint8).numpy().data)
                del value  # or the next one would lie beside it
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


# ---- reading


def load_weights(folder: str | Path, kind: str) -> Artifact:
    """Read a folder that ``save_weights`` wrote, or one of a run that has saved a checkpoint.

    Raises:
        InputError: nothing there, another kind, a newer schema, bytes that are not those written.
    """
    folder = Path(folder)
    described = folder / "model.json"
    if not described.is_file():
        if (folder / "checkpoints").is_dir() and (found := slices.newest(folder)):
            return _averaged(*found, kind)
        raise InputError(
            f"{folder} holds no trained {kind}: it needs model.json and model.safetensors; "
            f"name the --out of pipeline.train_{kind}"
        )
    config, made_of, files = describe_folder(folder, kind)
    tensors: dict[str, Tensor] = {}
    for name, digest in files.items():
        tensors |= _read_file(folder / Path(name).name, digest)
    return Artifact(folder, config, tensors, made_of, fingerprint_of(files))


def describe_folder(
    folder: Path, kind: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Config, ``made_of`` and sha256 of each file, as ``model.json`` says; no weights are read.

    Raises:
        InputError: no such file, another kind, a newer schema, a description that is damaged.
    """
    described = folder / "model.json"
    try:
        description = json.loads(described.read_text())
        crc = description.pop("crc32", None)
        version, found_kind = description["schema_version"], description["kind"]
        if type(version) is not int or version < 1:
            raise TypeError(f"schema_version is {version!r}")
        if version == SCHEMA_VERSION and crc != _crc(description):
            raise ValueError("it is not as it was written (crc32 differs)")
        # the first schema had one file
        files = {ONE_FILE: description["sha256"]} if version == 1 else description["files"]
        config, made_of = description["config"], description["made_of"]
        if not files or not all(isinstance(value, str) for pair in files.items() for value in pair):
            raise TypeError(f"files are {files!r}")
        if not isinstance(config, dict) or not isinstance(made_of, dict):
            raise TypeError("config and made_of are no objects")
    except OSError as error:
        raise InputError(
            f"{described} cannot be read ({error.strerror}); name the folder of a trained {kind}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{described} does not describe a model: {error}; export it again"
        ) from error
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{described} has schema version {version}, this code reads up to {SCHEMA_VERSION}; "
            "update the code"
        )
    if found_kind != kind:
        raise InputError(f"{folder} holds a {found_kind}, a {kind} is needed")
    return config, made_of, files


def _read_file(path: Path, digest: str) -> dict[str, Tensor]:
    try:
        if slices.sha256(path) != digest:
            raise InputError(
                f"{path} is not the file that model.json describes (sha256 differs): "
                "the copy is broken; copy or export it again"
            )
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): the copy is broken; copy or export it again"
        ) from error
    return tensors


def _averaged(folder: Path, meta: dict[str, Any], kind: str) -> Artifact:
    """The averaged weights in a checkpoint, whole in memory."""
    if meta["kind"] != kind:
        raise InputError(f"{folder} holds a {meta['kind']}, a {kind} is needed")
    source = slices.open_slices(folder, meta)
    config, made_of = describe(meta)
    key = "ema" if meta["applied"] else "weight"
    shapes: dict[str, list[int]] = meta["shapes"]
    tensors = {
        name: source.read(name, key, 0, math.prod(shape)).view(shape)
        for name, shape in shapes.items()
    }
    digests = {name: file["sha256"] for name, file in meta["files"].items()}
    return Artifact(folder, config, tensors, made_of, fingerprint_of(digests))


def describe(meta: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and ``made_of`` of the model in a checkpoint, from its description."""
    identity = dict(meta["identity"])
    preset = identity.pop("preset")
    config: dict[str, Any] = preset["model"]
    made_of = identity | {"updates": meta["updates"]}
    if "caption_dropout" in preset:  # without it no guidance
        made_of["caption_dropout"] = preset["caption_dropout"]
    return config, made_of


def export(
    folder: Path,
    meta: dict[str, Any],
    out: Path,
    *,
    key: str = "ema",
    dtype: torch.dtype = torch.float32,
    file_bytes: int = FILE_BYTES,
) -> str:
    """Write the weights of a checkpoint; returns their fingerprint.

    Args:
        folder: the checkpoint.
        meta: its description.
        out: made when missing.
        key: "ema", the average, or "weight", as the last update left them.
        dtype: of what is written.
        file_bytes: of one file, about.
    """
    source = slices.open_slices(folder, meta)

    def entry(name: str, shape: list[int]) -> Entry:
        def read() -> Tensor:
            flat = source.read(name, key, 0, math.prod(shape))
            return flat.view(shape).to(dtype)

        return Entry(dtype, tuple(shape), read)

    config, made_of = describe(meta)
    entries = {name: entry(name, shape) for name, shape in meta["shapes"].items()}
    return save_weights(out, meta["kind"], config, entries, made_of, file_bytes)
