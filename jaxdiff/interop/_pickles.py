"""Pickles of PyTorch, read as descriptions of tensors; nothing in them is executed.

A pickle is a program for a small stack machine. Here its instructions, as `pickletools.genops`
lists them, are followed one by one on plain values: those that make numbers, strings, lists, tuples
and dictionaries are done; a name of a module and a function stays a name; and "call" is known for
four names, which `_call` turns into the records below. All else is refused by its name. There is no
path from here to an import, a call or an attribute of what a file names.
"""

from __future__ import annotations

import pickletools
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np


class Global(NamedTuple):
    """A name of something in a module, which is never looked up."""

    name: str


class Storage(NamedTuple):
    """The memory of one or more tensors.

    Attributes:
      dtype: of its entries.
      key: under which the file has it.
      size: how many entries it has.
    """

    dtype: np.dtype
    key: str
    size: int


class Tensor(NamedTuple):
    """A view of a storage; all counts are of entries."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_STORAGES = {
    Global(f"torch.{name}Storage"): np.dtype(dtype)
    for name, dtype in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": jnp.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
}
_TENSOR = Global("torch._utils._rebuild_tensor_v2")
_PARAMETER = Global("torch._utils._rebuild_parameter")
_ORDERED = Global("collections.OrderedDict")
_KNOWN = {_TENSOR, _PARAMETER, _ORDERED, *_STORAGES}
_MARK = object()

# What an instruction puts on the stack, where that is a constant or what stands behind it.
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def follow(file: BinaryIO) -> Any:
    """Follows the pickle at which a file stands, and leaves the file behind it.

    Returns:
      Numbers, strings, None, lists, tuples and dictionaries of these and of the records above.

    Raises:
      ValueError: it is no pickle, or does what is not among the things that a checkpoint of
        PyTorch does; names that.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                (result,) = stack
                return result
            _do(opcode.name, argument, stack, memo)
    except _Refused:
        raise
    except Exception as error:  # a damaged one may fail in any of the above
        raise ValueError(f"its pickle is damaged or cut off: {error!r}") from error
    raise ValueError("its pickle is cut off")


class _Refused(ValueError):
    """A pickle that does what it may not."""


def _do(name: str, argument: Any, stack: list, memo: dict) -> None:
    """Does one instruction."""
    if name in ("PROTO", "FRAME"):
        return
    if name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in _VALUES:
        stack.append(argument)
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "EMPTY_DICT":
        stack.append({})
    elif name == "EMPTY_LIST":
        stack.append([])
    elif name in _TUPLES:
        stack.append(tuple(_pop(stack, _TUPLES[name])))
    elif name == "TUPLE":
        stack.append(tuple(_pop_to_mark(stack)))
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "APPEND":
        _extend(stack, _pop(stack, 1))
    elif name == "APPENDS":
        _extend(stack, _pop_to_mark(stack))
    elif name == "SETITEM":
        _update(stack, _pop(stack, 2))
    elif name == "SETITEMS":
        _update(stack, _pop_to_mark(stack))
    elif name == "GLOBAL":
        stack.append(_global(argument.replace(" ", ".", 1)))
    elif name == "STACK_GLOBAL":
        module, attribute = _pop(stack, 2)
        stack.append(_global(f"{module}.{attribute}"))
    elif name == "BINPERSID":
        stack.append(_storage(*_pop(stack, 1)))
    elif name == "REDUCE":
        stack.append(_call(*_pop(stack, 2)))
    elif name == "BUILD":
        # The version numbers that PyTorch hangs on its dictionaries; nobody needs them.
        _pop(stack, 1)
        if type(stack[-1]) is not dict:
            raise _Refused(f"its pickle sets attributes of {_describe(stack[-1])}, no dictionary")
    else:
        raise _Refused(
            f"its pickle has the instruction {name}, which checkpoints of PyTorch do not need: it "
            "is refused, nothing was executed"
        )


def _pop(stack: list, count: int) -> list:
    """Takes so many values off the stack."""
    if count == 0:
        return []
    values = stack[-count:]
    if len(values) < count or any(value is _MARK for value in values):
        raise ValueError("too few values")
    del stack[-count:]
    return values


def _pop_to_mark(stack: list) -> list:
    """Takes what stands above the last mark off the stack, and the mark."""
    values = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]


def _extend(stack: list, values: list) -> None:
    """Appends values to the list on the stack."""
    if type(stack[-1]) is not list:
        raise ValueError("append to no list")
    stack[-1].extend(values)


def _update(stack: list, values: list) -> None:
    """Sets entries of the dictionary on the stack: keys and values by turns."""
    if type(stack[-1]) is not dict or len(values) % 2:
        raise ValueError("entries of no dictionary")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if not isinstance(key, (str, int)):
            raise _Refused(f"its pickle has a dictionary with the key {_describe(key)}")
        if key in stack[-1]:
            raise _Refused(f"its pickle has the key {key!r} twice in one dictionary")
        stack[-1][key] = value


def _global(name: str) -> Global:
    """Returns a name that may be mentioned, as a name."""
    if Global(name) not in _KNOWN:
        raise _Refused(
            f"its pickle mentions {name}, which is not among what tensors need: it is refused, "
            "nothing was executed. If you trust the file, save only its state_dict anew, best with "
            "safetensors"
        )
    return Global(name)


def _storage(reference: Any) -> Storage:
    """Reads a reference to a storage: ("storage", type, key, device, size), perhaps (..., None)."""
    fits = isinstance(reference, tuple) and not isinstance(reference, Storage)
    fits = fits and len(reference) in (5, 6) and reference[0] == "storage"
    if not (fits and reference[1] in _STORAGES and reference[5:] in ((), (None,))):
        raise _Refused(f"its pickle refers to {_describe(reference)}, which is no storage")
    _, kind, key, _, size = reference[:5]
    if type(key) is not str or type(size) is not int or size < 0:
        raise _Refused(f"its pickle refers to {_describe(reference)}, which is no storage")
    return Storage(_STORAGES[kind], key, size)


def _call(function: Any, arguments: Any) -> Any:
    """Returns what a call describes, for the functions of which there is one."""
    if type(arguments) is tuple:
        if function == _ORDERED and arguments in ((), ([],)):
            return {}
        if function == _PARAMETER and arguments and isinstance(arguments[0], Tensor):
            return arguments[0]
        if function == _TENSOR and len(arguments) in (6, 7):
            storage, offset, shape, strides = arguments[:4]
            fits = isinstance(storage, Storage) and type(shape) is tuple and type(strides) is tuple
            counts = (offset, *shape, *strides) if fits else ()
            fits = fits and all(type(count) is int and count >= 0 for count in counts)
            if fits and len(shape) == len(strides):
                return Tensor(storage, offset, shape, strides)
    raise _Refused(f"its pickle calls {_describe(function)} with {_describe(arguments)}")


def _describe(value: Any) -> str:
    """Returns a value in at most so many words."""
    if isinstance(value, (Global, str, int, float, Storage, Tensor)) or value is None:
        return repr(value)[:200]
    if type(value) is tuple and len(value) < 8:
        return f"({', '.join(_shorter(part) for part in value)})"
    return f"a {type(value).__name__}"


def _shorter(value: Any) -> str:
    return f"a {type(value).__name__}" if type(value) is tuple else _describe(value)
