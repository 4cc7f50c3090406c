"""Reads pickles as data: the opcodes are interpreted here, and no name in a file is ever looked up or called.

A pickle is a program (Python's ``pickletools`` describes each opcode). Here it may build numbers, texts and containers;
a name ("GLOBAL module.name") has to be in the table that the caller gives, of values and of makers that check what they
are given. Work and memory are bounded by the length of the file, and so is a walk through the result.
"""

import struct
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

_OPCODE_BYTES = 100  # of memory that one opcode may cost: a container, or a place in one or in the memo
_DEEPEST = 64  # containers in one another
_LONGEST_INT = 32  # bytes
_LARGEST_KEY = 1 << 60  # beyond it many whole numbers share a hash
_NOT_LATIN1 = bytes(range(0xC4))  # what UTF-8 of characters up to U+00FF is made of


class UnsafeError(ValueError):
    """A pickle names what is none of the data that is expected; the message is the name."""


class MalformedError(ValueError):
    """A pickle is no program that its writer makes, or one that asks for too much."""


class Maker(NamedTuple):
    """What stands for a class or function of a file: ``make`` is called with whatever arguments the file gives."""

    name: str
    make: Callable[..., Any]


class Blank:
    """An object of a class that is only described: its name, and the state or arguments that a file gives it."""

    def __init__(self, kind: str, state: Any) -> None:
        self.kind, self.state = kind, state


def fill_blank(blank: Blank, state: Any) -> None:
    blank.state = state


class Names(NamedTuple):
    """What a kind of file may hold.

    Attributes:
        known: By ``module.name``: a value, or a :class:`Maker`.
        fill: By the type of an object: what gives it its state.
    """

    known: Mapping[str, Any]
    fill: Mapping[type, Callable[[Any, Any], None]]


_KEYS = (str, bytes, bool, float, type(None), Blank)  # and whole numbers: of texts no file can know the hash


class _Mark:
    pass


_MARK = _Mark()


def read_pickle(
    data: bytes, names: Names, *, room: int, stored: Callable[[Any], Any] | None = None, start: int = 0
) -> tuple[Any, int]:
    """What a pickle of protocol 2 to 5 holds, and where it ends.

    Args:
        room: Bytes of memory that its values may take.
        stored: Finds what a persistent id stands for.

    Raises:
        UnsafeError: It needs a name that is not in ``names``.
        MalformedError: It is damaged, too deep or too large.
    """
    program = _Program(data, names, room, stored, start)
    try:
        value, end = program.run()
    except (UnsafeError, MalformedError):
        raise
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
        raise MalformedError(f"its pickle is damaged ({str(error)[:120] or type(error).__name__})") from error
    _check_result(value, most=4 * (end - start) + 1000)
    return value, end


class _Program:
    """A stack machine, as ``pickle`` describes it."""

    def __init__(self, data: bytes, names: Names, room: int, stored: Callable[[Any], Any] | None, start: int) -> None:
        self._data, self._names, self._room, self._stored, self._at = data, names, room, stored, start
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> tuple[Any, int]:
        data, steps = self._data, _STEPS
        while True:
            opcode = data[self._at]
            self._at += 1
            if opcode == _STOP:
                value = self._pop()
                if self._stack:
                    raise MalformedError("its pickle is damaged (more than one value)")
                return value, self._at
            step = steps.get(opcode)
            if step is None:
                raise MalformedError(f"its pickle has the opcode {bytes([opcode])!r}, which torch.save does not write")
            self._charge(_OPCODE_BYTES)
            step(self)

    def _charge(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise MalformedError("its pickle asks for more memory than the file's size allows")

    def _take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if len(found) != count:
            raise MalformedError("its pickle is cut short")
        self._at += count
        return found

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise MalformedError("its pickle is damaged (a mark in the place of a value)")
        return value

    def _drop(self) -> None:
        self._stack.pop()

    def _drop_to_mark(self) -> None:
        self._pop_to_mark()

    def _pop_to_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise MalformedError("its pickle is damaged (no mark)")
        found = self._stack[place + 1 :]
        del self._stack[place:]
        return found

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at, self._at + 256)
        text = self._take(end - self._at + 1)
        return text[:-1].decode("ascii", errors="backslashreplace")

    # Numbers and texts

    def _long(self) -> None:
        size = self._number("<B")
        if size > _LONGEST_INT:
            raise MalformedError(f"its pickle has a number of {size} bytes")
        self._push(int.from_bytes(self._take(size), "little", signed=True))

    def _text(self, form: str, encoding: str = "utf-8") -> None:
        size = self._number(form)
        raw = self._take(size)
        narrow = raw.isascii() or not raw.translate(None, _NOT_LATIN1)
        self._charge(size if narrow else 4 * size)
        self._push(raw.decode(encoding))

    def _bytes(self, form: str) -> None:
        size = self._number(form)
        self._charge(size)
        self._push(self._take(size))

    # Containers

    def _tuple(self, size: int) -> None:
        values = tuple(self._pop() for _ in range(size))
        self._push(values[::-1])

    def _append(self, values: list[Any]) -> None:
        target = self._top(list)
        target.extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._top(dict, OrderedDict)
        keys = values[::2]
        for key in keys:
            _check_key(key)
        target.update(zip(keys, values[1::2], strict=True))

    def _add_items(self) -> None:
        values = self._pop_to_mark()
        for value in values:
            _check_key(value)
        self._top(set).update(values)

    def _top(self, *kinds: type) -> Any:
        if type(self._stack[-1]) not in kinds:
            raise MalformedError(
                f"its pickle is damaged (a {type(self._stack[-1]).__name__} is no {kinds[0].__name__})"
            )
        return self._stack[-1]

    # Memo

    def _put(self, place: int) -> None:
        if self._stack[-1] is _MARK:
            raise MalformedError("its pickle is damaged (a mark in the place of a value)")
        self._memo[place] = self._stack[-1]

    # Names, and what is made of them

    def _find(self, name: str) -> None:
        if name not in self._names.known:
            raise UnsafeError(name if name.isprintable() else ascii(name))
        self._push(self._names.known[name])

    def _stack_name(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise MalformedError("its pickle is damaged (a name that is no text)")
        self._find(f"{module}.{name}"[:256])

    def _make(self) -> None:
        arguments, maker = self._pop(), self._pop()
        if type(maker) is not Maker or type(arguments) is not tuple:
            raise MalformedError("its pickle calls what cannot be called")
        value = maker.make(*arguments)
        self._charge(sys.getsizeof(value))
        self._push(value)

    def _fill(self) -> None:
        state, target = self._pop(), self._stack[-1]
        fill = self._names.fill.get(type(target))
        if fill is None:
            raise MalformedError(f"its pickle gives a {type(target).__name__} a state")
        fill(target, state)
        self._charge(sys.getsizeof(target) + sys.getsizeof(getattr(target, "__dict__", None)))

    def _find_stored(self) -> None:
        if self._stored is None:
            raise MalformedError("its pickle refers to what lies outside of it")
        self._push(self._stored(self._pop()))

    def _skip_frame(self) -> None:
        if self._number("<Q") > len(self._data) - self._at:
            raise MalformedError("its pickle is cut short")

    def _protocol(self) -> None:
        version = self._number("<B")
        if not 2 <= version <= 5:
            raise MalformedError(f"its pickle is of protocol {version}, torch.save writes 2")


_STOP = ord(".")
# fmt: off
_STEPS: dict[int, Callable[[_Program], None]] = {  # pickletools names the opcodes
    0x80: _Program._protocol, 0x95: _Program._skip_frame,
    ord("("): lambda p: p._push(_MARK),
    ord("0"): _Program._drop, ord("1"): _Program._drop_to_mark, ord("2"): lambda p: p._push(p._stack[-1]),
    ord("N"): lambda p: p._push(None), 0x88: lambda p: p._push(True), 0x89: lambda p: p._push(False),
    ord("J"): lambda p: p._push(p._number("<i")), ord("K"): lambda p: p._push(p._number("<B")),
    ord("M"): lambda p: p._push(p._number("<H")), ord("G"): lambda p: p._push(p._number(">d")),
    0x8A: _Program._long,
    ord("X"): lambda p: p._text("<I"), 0x8C: lambda p: p._text("<B"), 0x8D: lambda p: p._text("<Q"),
    ord("U"): lambda p: p._text("<B", "ascii"), ord("T"): lambda p: p._text("<I", "ascii"),
    ord("B"): lambda p: p._bytes("<I"), ord("C"): lambda p: p._bytes("<B"), 0x8E: lambda p: p._bytes("<Q"),
    ord(")"): lambda p: p._push(()), 0x85: lambda p: p._tuple(1), 0x86: lambda p: p._tuple(2),
    0x87: lambda p: p._tuple(3), ord("t"): lambda p: p._push(tuple(p._pop_to_mark())),
    ord("]"): lambda p: p._push([]), ord("a"): lambda p: p._append([p._pop()]),
    ord("e"): lambda p: p._append(p._pop_to_mark()),
    ord("}"): lambda p: p._push({}), ord("s"): lambda p: p._set_items([p._pop(), p._pop()][::-1]),
    ord("u"): lambda p: p._set_items(p._pop_to_mark()),
    0x8F: lambda p: p._push(set()), 0x90: _Program._add_items,
    ord("q"): lambda p: p._put(p._number("<B")), ord("r"): lambda p: p._put(p._number("<I")),
    0x94: lambda p: p._put(len(p._memo)),
    ord("h"): lambda p: p._push(p._memo[p._number("<B")]), ord("j"): lambda p: p._push(p._memo[p._number("<I")]),
    ord("c"): lambda p: p._find(f"{p._line()}.{p._line()}"), 0x93: _Program._stack_name,
    ord("R"): _Program._make, 0x81: _Program._make, ord("b"): _Program._fill, ord("Q"): _Program._find_stored,
}
# fmt: on


def _check_key(key: Any) -> None:
    """Refuse what cannot be a key, and what makes a dict slow: keys that a file can choose to be of one hash."""
    whole = type(key) is int and abs(key) < _LARGEST_KEY
    if not whole and type(key) not in _KEYS:
        raise MalformedError(f"its pickle has a key that is a {type(key).__name__}")


def _check_result(value: Any, most: int) -> None:
    """Refuse makers that were not called, cycles, too deep nesting, and parts that stand in too many places.

    Without this last one a kilobyte of lists that hold each other twice keeps who walks through it busy for ever.
    """
    measured: dict[int, tuple[int, int]] = {}  # size and height of containers that were walked through
    path: list[_Walk] = []
    found = None if _children(value) is not None else (1, 0)
    here = value
    while found is None or path:
        if found is None:
            path.append(_Walk(here))
            if len(path) > _DEEPEST:
                raise MalformedError(f"its values lie in more than {_DEEPEST} containers, or a container in itself")
        else:
            path[-1].add(*found, most)
        here = next(path[-1].rest, _MARK)
        if here is _MARK:
            done = path.pop()
            found = measured[id(done.container)] = (done.size, done.height)
        else:
            found = measured.get(id(here)) if _children(here) is not None else (1, 0)


class _Walk:
    """A container that is being walked through."""

    def __init__(self, container: Any) -> None:
        self.container, self.size, self.height = container, 1, 1
        self.rest = _children(container) or iter(())

    def add(self, size: int, height: int, most: int) -> None:
        self.size, self.height = self.size + size, max(self.height, height + 1)
        if self.size > most or self.height > _DEEPEST:
            what = f"would be more than {most} if each place had its own" if self.size > most else "lie too deep"
            raise MalformedError(f"its values {what}")


def _children(value: Any) -> Iterator[Any] | None:
    """What a container holds; None for all else."""
    kind = type(value)
    if kind is Maker:
        raise MalformedError(f"it holds {value.name} itself")
    if kind in (list, tuple, set):
        return iter(value)
    if kind is dict:
        return iter([*value.values(), *(key for key in value if type(key) is Blank)])
    if kind is Blank:
        return iter((value.state,))
    if kind is OrderedDict:
        return iter([*value.values(), *vars(value).values()])
    if kind is Namespace:
        return iter(vars(value).values())
    return None
