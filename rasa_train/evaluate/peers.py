"""The two processes of a check: one holds the program that a model wrote, the other its test. They talk over pipes.

The test's process never runs the program's code. Its names for the program's functions are ``Remote`` objects, whose
calls the program's process carries out; arguments and results travel as plain data (``values``), and are compared by
the test with Python's own operations. The program's process knows neither the test nor what it expects.

Runs inside the sandbox, where only the standard library can be imported.
"""

from __future__ import annotations

import builtins
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .values import Codec, Decoder

MESSAGE_BYTES = 16 << 20
"""Most bytes of one message, i.e. of the arguments of a call, or of its result."""
PROGRAM = "solution"
"""Name of the module that the program is; not ``__main__``, whose part of a program is for use as a command."""
TEST = "problem"
"""Name of the module that the test is, with what the problem's own text defines."""


class Remote:
    """Stands for an object of the other process. It is equal to nothing but itself, whatever its class says."""

    def __init__(self, peer: Peer, number: int, name: str) -> None:
        self._peer, self._number, self._name = peer, number, name
        self._seen: dict[Any, Any] = {}

    def _ask(self, request: str, *key: Any) -> Any:
        """Return an answer, the first one every time, so that an object is not another one for each check."""
        where = (request, *key)
        if where not in self._seen:
            self._seen[where] = self._peer.ask(request, self._number, *key)
        return self._seen[where]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        value = self._ask("get", str(name))
        if isinstance(value, RemoteFunction) and self._peer.hostile:
            raise TypeError(f"the program returned an object of class {self._name}, whose methods a test cannot trust")
        return value

    def __str__(self) -> str:
        return _text(self._ask("str"))

    def __repr__(self) -> str:
        return _text(self._ask("repr"))


class RemoteObject(Remote):
    """An object whose attributes and items are data: it has no methods here, and no length that may not be true."""

    def __bool__(self) -> bool:
        return bool(self._ask("bool"))

    def __iter__(self) -> Iterator[Any]:
        if "items" not in self._seen:
            found = self._peer.ask("iter", self._number)
            if not isinstance(found, Remote):
                raise TypeError(f"{self._name} object is not iterable")
            self._seen["items"] = [*RemoteIterator(self._peer, found._number, found._name)]
        return iter(self._seen["items"])

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)


class RemoteIterator(Remote):
    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._peer.ask("next", self._number)


class RemoteFunction(Remote):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.ask("call", self._number, args, kwargs)


class RemoteClass(RemoteFunction):
    pass


class Made(RemoteObject, RemoteFunction):
    """A class of the program that the test asked for by name, or an object that the test made of one. The class is what
    is tested, so it has its methods, and decides when two of its objects are equal."""

    def _ask(self, request: str, *key: Any) -> Any:
        return self._peer.ask(request, self._number, *key)

    def __getattr__(self, name: str) -> Any:
        return _made(self._ask("get", str(name)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _made(super().__call__(*args, **kwargs))

    def __len__(self) -> int:
        return operator.index(self._ask("len"))

    def __iter__(self) -> Iterator[Any]:
        self._seen.clear()
        return super().__iter__()

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Remote) and bool(self._ask("eq", other)))

    __hash__ = Remote.__hash__


def _made(value: Any) -> Any:
    if type(value) in (RemoteObject, RemoteFunction, RemoteClass):
        value._peer.theirs[value._number] = value = Made(value._peer, value._number, value._name)
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("got an object that is no text")
    return value


SERVED: dict[str, Callable[..., Any]] = {
    "call": lambda function, args, kwargs: function(*args, **kwargs),
    "get": getattr,
    "bool": operator.truth,
    "len": len,
    "iter": iter,
    "next": next,
    "item": operator.getitem,
    "str": str,
    "repr": repr,
    "eq": operator.eq,
}
"""What one process may ask of an object of the other one."""


class Peer:
    """One end of the pipes.

    Args:
        codec: ``values.Codec``.
        pipes: descriptors to read from and to write to.
        prompt: the problem's own text. Objects of its classes are sent by their attributes.
        fail: ends this process; called with the reason when the other process has ended (None) or breaks the rules.
        hostile: whether the other process holds the program.
    """

    def __init__(
        self,
        codec: type[Codec],
        pipes: tuple[int, int],
        prompt: str,
        fail: Callable[[str | None], NoReturn],
        hostile: bool = False,
    ) -> None:
        refer: dict[str, Decoder] = {
            "object": ((int, str, str), self._refer),
            "yours": ((int,), lambda codec, number: self.mine[number]),
            "exception": ((list,), lambda codec, names: codec.exception_class(names, self._own())),
            "instance": ((str, list), self._instance),
            "member": ((str, str), lambda codec, name, member: self._class(name)[member]),
        }
        self.codec, self.pipes, self.hostile, self.fail = codec(self._hold, refer), pipes, hostile, fail
        self.shared = frozenset(re.findall(r"^class (\w+)", prompt, re.M))
        self.namespace: dict[str, Any] = {}
        self.mine: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.theirs: dict[int, Remote] = {}
        self.open: set[int] = set()
        self.strange = ""
        self.line: tuple[BaseException | None, int] = (None, 0)
        # Bound now, because the program may replace what the module has.
        self.read, self.write = os.read, os.write

    def _hold(self, value: Any) -> list[Any]:
        """Return a reference to an object of this process, or to the one of the other process that it stands for."""
        if isinstance(value, Remote) and value._peer is self:
            return ["yours", value._number]
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["exception", [[c.__module__, c.__name__] for c in value.__mro__]]
        name, kind = type(value).__name__, type(value)
        if name in self.shared and self.namespace.get(name) is kind and id(value) not in self.open:
            if hasattr(kind, "__members__"):
                return ["member", name, value.name]
            if hasattr(value, "__dict__"):
                self.open.add(id(value))
                state = self.codec.encode(dict(vars(value)))
                self.open.discard(id(value))
                return ["instance", name, state]
        number = self.numbers.setdefault(id(value), len(self.mine))
        if number == len(self.mine):
            self.mine.append(value)
        sort = "function" if callable(value) else "iterator" if hasattr(type(value), "__next__") else "object"
        return ["object", number, "class" if isinstance(value, type) else sort, str(type(value).__name__)]

    def _own(self) -> dict[str, dict[str, Any]]:
        return {PROGRAM: self.namespace, TEST: self.namespace}

    def _class(self, name: str) -> Any:
        if name not in self.shared:
            raise ValueError(f"the problem has no class {name[:50]}")
        return self.namespace[name]

    def _instance(self, codec: Codec, name: str, state: list[Any]) -> Any:
        kind, attributes = self._class(name), codec.decode(state)
        if any(callable(getattr(kind, key, None)) or callable(value) for key, value in attributes.items()):
            raise ValueError("an attribute of an object is a function, or has the name of one")
        value = object.__new__(kind)
        vars(value).update(attributes)
        return value

    def _refer(self, codec: Codec, number: int, sort: str, name: str) -> Remote:
        kinds = {"function": RemoteFunction, "class": RemoteClass, "iterator": RemoteIterator}
        kind: type[Remote] = kinds.get(sort, RemoteObject)
        if kind is RemoteObject:
            self.strange = name[:50]
        if number not in self.theirs:
            self.theirs[number] = kind(self, number, name)
        return self.theirs[number]

    def ask(self, *message: Any) -> Any:
        """Send a request and return the answer, serving the requests that come first. Lists, dictionaries and sets
        among the arguments are changed as the other process changed its own."""
        self.send(message)
        while True:
            kind, *rest = self.receive()
            if kind == "value":
                value, changed = rest
                if changed is not None:
                    self.codec.update([*message[2]], [*changed])
                return value
            if kind == "raise":
                error = self.exception(*rest)
                if isinstance(error, StopIteration) and message[0] != "next":
                    # StopIteration would end a loop of the test early, as if all were well.
                    raise RuntimeError("the program raised StopIteration") from error
                raise error
            self.serve(kind, *rest)

    def serve(self, kind: str, number: int, *rest: Any) -> None:
        """Carry out one request and answer it."""
        try:
            target = self.mine[number]
            if self.hostile and not _allowed(kind, target, rest):
                raise TypeError("not for the program")
            before = self.codec.encode(rest[0]) if kind == "call" else None
            value = SERVED[kind](target, *rest)
            after = self.codec.encode(rest[0]) if kind == "call" else None
            self.send(("value", value, rest[0] if before != after else None))
        except BaseException as error:
            self.send_error(error)

    def send_error(self, error: BaseException) -> None:
        names = [[str(c.__module__), str(c.__name__)] for c in type(error).__mro__]
        try:
            text = str(error)[:300]
        except BaseException as second:
            text = f"no message: {type(second).__name__}"
        try:
            args = list(error.args) if {*map(type, error.args)} <= {int, str} else None
            self.send(("raise", names, args, text, line_of(error, f"<{PROGRAM}>")))
        except (TypeError, ValueError, RecursionError):
            self.send(("raise", names, None, text, 0))

    def send(self, message: Any) -> None:
        data = self.codec.pack(message)
        if len(data) > MESSAGE_BYTES:
            raise ValueError(f"a value has more than {MESSAGE_BYTES >> 20} MiB")
        data = len(data).to_bytes(4, "big") + data
        try:
            while data:
                data = data[self.write(self.pipes[1], data) :]
        except OSError:
            self.fail(None)

    def receive(self) -> Any:
        size = int.from_bytes(self._read(4), "big")
        if size > MESSAGE_BYTES:
            self.fail("the program sent more than a value may have")
        data = self._read(size)
        try:
            message = self.codec.unpack(data)
            kind = message[0]
            if len(message) != {"value": 3, "raise": 5, "call": 4, "get": 3, "item": 3, "eq": 3}.get(kind, 2):
                raise ValueError(kind)
            return message
        except MemoryError:
            self.fail("MemoryError: the value that the program sent does not fit")
        except Exception as error:
            self.fail(f"the program sent what is not a value: {type(error).__name__}: {str(error)[:100]}")

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = self.read(self.pipes[0], min(size - len(data), 1 << 20))
            if not chunk:
                self.fail(None)
            data += chunk
        return bytes(data)

    def exception(self, names: list[Any], args: list[Any] | None, text: str, line: int) -> BaseException:
        kind = self.codec.exception_class(names, self._own())
        try:
            error = kind(*([text] if args is None else args))
        except Exception:
            error = kind.__new__(kind)
        self.line = error, line
        return error


def _allowed(kind: str, target: Any, rest: tuple[Any, ...]) -> bool:
    """Return whether the program may ask this of an object of the test: to call it, to iterate over it, and to read the
    public attributes of objects whose class the test defines. A function's globals are what the test expects."""
    if kind == "get":
        return type(target).__module__ == TEST and type(rest[0]) is str and not rest[0].startswith("_")
    return kind in ("call", "next", "iter", "len", "bool", "item")


def hold_program(peer: Peer, source: str) -> NoReturn:
    """Run the program as a module, then serve the test's process."""
    module = ModuleType(PROGRAM)
    sys.modules[PROGRAM] = module
    peer.namespace = vars(module)
    peer.mine.append(peer.namespace)
    try:
        exec(compile(source, f"<{PROGRAM}>", "exec"), peer.namespace)
        peer.send(("value", None, None))
    except BaseException as error:
        peer.send_error(error)
    while True:
        peer.serve(*peer.receive())


def check(peer: Peer, prompt: str, test: str, entry_point: str) -> None:
    """Run the test on the program of the other process. Raises what the program or the test raises."""
    kind, *rest = peer.receive()
    if kind == "raise":
        raise peer.exception(*rest)
    if not test:
        return
    sys.modules[TEST] = module = ModuleType(TEST)
    peer.namespace = names = vars(module)
    code = compile(f"{test}\n\ncheck({entry_point})\n", f"<{TEST}>", "exec")
    _define(prompt, names)
    entry = entry_point.partition(".")[0].partition("(")[0].strip()
    function = isinstance(names.pop(entry, None), FunctionType)
    for name in sorted(_names(code) - names.keys() - vars(builtins).keys() - {"check"}):
        try:
            value = peer.ask("item", 0, name)
        except KeyError:
            continue
        made = isinstance(value, RemoteClass) and name[0].isupper() and not (function and name == entry)
        names[name] = _made(value) if made else value
    peer.strange = ""
    exec(code, names)


def _define(prompt: str, names: dict[str, Any]) -> None:
    """Define what the problem's own text defines, e.g. functions that the test calls. The text may end in the middle of
    a function, and may be no program at all."""
    for text in (prompt, f"{prompt.rstrip()}\n    pass\n"):
        try:
            exec(compile(text, f"<{TEST}>", "exec"), names)
            return
        except Exception:
            continue


def _names(code: CodeType) -> set[str]:
    return {*code.co_names}.union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def line_of(error: BaseException, file: str) -> int:
    """Return the line of the last call in ``file`` that the exception has passed, or 0."""
    line, trace = 0, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def reason(peer: Peer, error: BaseException) -> str:
    """Return why the program did not pass, given what ended the test."""
    line = peer.line[1] if peer.line[0] is error else line_of(error, f"<{TEST}>")
    where = f" (line {line})" if line else ""
    returned = f"; the program returned an object of class {peer.strange}" if peer.strange else ""
    return f"{type(error).__name__}: {str(error)[:300]}{where}{returned}"
