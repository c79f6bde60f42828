"""Runs pickles of torch's modules with nothing of their own: no code, no class, no function.

It knows the instructions that torch.save writes and the names on three lists, and calls nothing
that a file names: a module becomes a ``Module``, a tensor a ``View``. Both are data, whatever is in
them; what they take is bounded by the length of the pickle.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

import torch

CLASSES = {
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
}
STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
}
# instructions whose argument is the value
VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# a set of a module is nothing that we read
CONTAINERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
NO_MEANING = {"PROTO", "FRAME", "STOP"}


class Refused(Exception):
    """What is wrong with a file."""


@dataclass
class Module:
    """What a pickled module becomes: its attributes, and no code."""

    kind: str
    held: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names; one of ours stands for it, or nothing."""

    path: str


@dataclass(frozen=True)
class Storage:
    """Where a file keeps values: ``n`` of them, under ``key``."""

    dtype: torch.dtype
    key: str
    n: int

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return self.n * self.dtype.itemsize


@dataclass(frozen=True)
class View:
    """What a pickled tensor becomes."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _empty_dict() -> dict[str, Any]:
    # takes nothing, so that all keys come past ``Machine._set_items``
    return {}


def _view(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> View:
    if not isinstance(storage, Storage):
        raise Refused("a tensor in it has no values")
    return View(storage, offset, size, stride)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _empty_dict,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    # nothing that we read
    "torch.device": lambda *_: None,
    "__builtin__.set": lambda *_: None,
    "builtins.set": lambda *_: None,
}
NAMES = CLASSES | STORAGES.keys() | FUNCTIONS.keys()


class Machine:
    """Runs the instructions of pickles of one file, and collects the storages that they name."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}

    def run(self, stream: IO[bytes]) -> Any:
        """The value of the pickle that starts here; ``stream`` is left behind its end."""
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        for op, arg, _ in pickletools.genops(stream):
            self._step(op.name, arg)
        return self._stack.pop()

    def _step(self, op: str, arg: Any) -> None:
        stack = self._stack
        if op in VALUES:
            stack.append(arg)
        elif op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op in CONTAINERS:
            stack.append(CONTAINERS[op]())
        elif op in TUPLES:
            stack.append(tuple(self._pop(TUPLES[op])))
        elif op == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif op == "MARK":
            self._marks.append(len(stack))
        elif op in ("BINPUT", "LONG_BINPUT"):
            self._memo[arg] = stack[-1]
        elif op == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[arg])
        elif op in ("SETITEM", "SETITEMS"):
            self._set_items(self._pop(2) if op == "SETITEM" else self._pop_to_mark())
        elif op in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self._pop(1) if op == "APPEND" else self._pop_to_mark()
            of_kind(stack[-1], list).extend(items)
        elif op == "GLOBAL":
            stack.append(_name(arg.replace(" ", ".")))
        elif op == "STACK_GLOBAL":
            module, name = self._pop(2)
            stack.append(_name(f"{module}.{name}"))
        elif op in ("NEWOBJ", "REDUCE"):
            stack.append(_made(*self._pop(2)))
        elif op == "BUILD":
            state = of_kind(stack.pop(), dict)
            of_kind(stack[-1], Module).held = state  # shared, for a copy could be one of thousands
        elif op == "BINPERSID":
            stack.append(self._persistent(stack.pop()))
        elif op not in NO_MEANING:
            raise Refused(f"torch writes no {op}")

    def _pop(self, n: int) -> list[Any]:
        if len(self._stack) < n:
            raise Refused("its instructions take what is not there")
        items = self._stack[-n:]
        del self._stack[-n:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        at = self._marks.pop()
        items = self._stack[at:]
        del self._stack[at:]
        return items

    def _set_items(self, items: list[Any]) -> None:
        target = of_kind(self._stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # what else is hashed may be nested so deep that hashing it ends the process
            if not isinstance(key, str | int | None):
                raise Refused(f"a dict in it has a {type(key).__name__} for a key")
            target[key] = value

    def _persistent(self, what: Any) -> Any:
        """What stands outside the pickle: weights and, before torch 1.6, sources of classes."""
        match what:
            case ("module", Name() as cls, *_):
                return cls
            case ("storage", Name(path), str(key), _, int(n), *view) if path in STORAGES:
                # views of storages went out of use with torch 0.4
                if n >= 0 and view in ([], [None]):
                    storage = Storage(STORAGES[path], key, n)
                    if self.storages.setdefault(key, storage) == storage:
                        return storage
        raise Refused("it refers to something that is neither weights nor a class")

    def check(self, n_bytes: int) -> None:
        """Refuse storages that take more than the ``n_bytes`` of their file."""
        claimed = sum(storage.n_bytes for storage in self.storages.values())
        if claimed > n_bytes:
            raise Refused(f"it claims {claimed:,} bytes of weights and has {n_bytes:,} in all")


def of_kind(value: Any, kind: type[Any]) -> Any:
    """``value``, or ``Refused`` when a file has something else in its place."""
    if not isinstance(value, kind):
        raise Refused(f"a {type(value).__name__} stands where a {kind.__name__.lower()} should")
    return value


def _name(path: str) -> Name:
    if path not in NAMES:
        raise Refused(f"it names {path[:80]!r}")
    return Name(path)


def _made(callee: Any, args: Any) -> Any:
    """What calling a name stands for."""
    if isinstance(callee, Name) and isinstance(args, tuple):
        if callee.path in FUNCTIONS:
            return FUNCTIONS[callee.path](*args)
        if callee.path in CLASSES:
            return Module(callee.path)
    raise Refused("it calls what is no function")
