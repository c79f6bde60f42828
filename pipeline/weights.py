"""Finished weights: a folder of ``model.safetensors`` and a ``model.json`` that says what it is.

The description holds the schema version, the kind and config of the model, the fingerprint of the
weights, and the fingerprints of what made them. Nothing is unpickled.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.console import InputError
from pipeline.files import write_json

Config = TypeVar("Config")

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """What ``load`` found in a folder."""

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


def save_weights(
    folder: str | Path,
    kind: str,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    made_of: dict[str, Any],
) -> str:
    """Write weights and their description; returns the fingerprint of the weights.

    Args:
        folder: made when missing; an older model in it is replaced.
        kind: "dvae" or "dalle".
        config: what builds the model, as JSON.
        tensors: the whole state dict.
        made_of: fingerprints of data, tokenizer, dVAE and what else it depends on.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    temporary = weights.with_name(weights.name + ".tmp")
    # to the file at once: bytes in between would hold a large model a second time
    save_file({n: value.detach().cpu().contiguous() for n, value in tensors.items()}, temporary)
    digest = _sha256(temporary, sync=True)
    os.replace(temporary, weights)
    description = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "config": config,
        "sha256": digest,
        "made_of": made_of,
    }
    write_json(folder / "model.json", description)
    return digest[:16]


def _sha256(path: Path, *, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(folder: str | Path, kind: str) -> Artifact:
    """Read a folder that ``save_weights`` wrote.

    Raises:
        InputError: nothing there, another kind, a newer schema, bytes that are not those written.
    """
    folder = Path(folder)
    described, weights = folder / "model.json", folder / "model.safetensors"
    if not described.is_file() or not weights.is_file():
        raise InputError(
            f"{folder} holds no trained {kind}: it needs model.json and model.safetensors; "
            f"name the --out of pipeline.train_{kind}"
        )
    try:
        description = json.loads(described.read_text())
        version, found = description["schema_version"], description["kind"]
        digest, config = description["sha256"], description["config"]
        made_of = description["made_of"]
        if not isinstance(version, int):
            raise TypeError(f"schema_version is {version!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{described} does not describe a model: {error}; export it again"
        ) from error
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{described} has schema version {version}, this code reads up to {SCHEMA_VERSION}; "
            "update the code"
        )
    if found != kind:
        raise InputError(f"{folder} holds a {found}, a {kind} is needed")
    if _sha256(weights) != digest:
        raise InputError(
            f"{weights} is not the file that {described.name} describes (sha256 differs): "
            "the copy is broken; copy or export it again"
        )
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise InputError(f"{weights} cannot be read: {error}") from error
    return Artifact(folder, config, tensors, made_of, digest[:16])
