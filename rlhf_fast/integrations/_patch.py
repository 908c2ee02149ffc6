"""Replaces functions of a framework by ours, checks each against the original, and puts the original back.

A framework is a table of sockets. Whatever this file does not understand, and whatever a replacement declines, goes to the
original: a patch may be slower than hoped, never different in meaning.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast._op import plain as undispatched
from rlhf_fast.integrations._compare import Unsupported, any_half, compare, plain, recorded, tensors_in, wants_gradients

CHECKED_ROWS = 512
"""Rows of logits the check looks at: both results and both gradients of a whole batch would take four times its memory."""


REASONS = 32
"""Reasons that are kept apart per function."""

DECLINED = (Unsupported, TypeError, ValueError, AttributeError, KeyError)
"""What a replacement raises before it has done anything: arguments it does not take, which get the original's own answer."""


@dataclass(frozen=True)
class Socket:
    """One function of a framework, and what replaces it."""

    home: str
    """Module that defines it."""
    name: str
    """"function" or "Class.method"."""
    ours: Callable[..., Any]
    """Has the original's signature; raises Unsupported where it does not have the original's meaning."""
    counts: str | Callable[[Mapping[str, Any]], Tensor] | None = None
    """Which slots of equally shaped results are compared: the argument that masks the others (they are 0 in ours), or a function
    of the arguments where ours corrects more than that."""
    rows: tuple[str, ...] = ()
    """Arguments whose leading dimensions are independent rows, so that a few of them are enough for the check."""
    rounds: Callable[[Sequence[Tensor]], bool] = any_half
    """Of the tensors of a call: whether the original computes in half precision, so that ours, which computes in fp32 and rounds
    once, gives other bits."""
    constant: tuple[int, ...] = ()
    """Results without a gradient in the original, by position; ours have one."""


@dataclass(frozen=True)
class Framework:
    """What `patch` knows about one framework."""

    name: str
    """Name of the distribution and of its package."""
    versions: tuple[str, str]
    """First supported version, and the first one that nobody has looked at."""
    sockets: tuple[Socket, ...]


class Row(NamedTuple):
    """One socket in the table that `patch` and `status` return."""

    symbol: str
    state: str
    """"waiting" for its first call, "checked", "rejected: ..." or "absent: ..."."""
    places: int
    """Modules, classes and registries that hold the replacement."""
    reached: int
    """Calls that ours served."""
    fell_through: Mapping[str, int]
    """{reason: calls that went to the original}."""


class Table(list[Row]):
    """Rows that print as a table."""

    def __str__(self) -> str:
        lines = [("symbol", "places", "ours", "original", "state")]
        for r in self:
            lines.append((r.symbol, str(r.places), str(r.reached), str(sum(r.fell_through.values())), r.state))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        for r in self:
            text += [f"{r.symbol}: {count} x original: {reason}" for reason, count in r.fell_through.items()]
        return "\n".join(text)


_MISSING = object()


class _Checking(threading.local):
    on = False


_checking = _Checking()


@dataclass
class Patched:
    """One replaced function."""

    framework: str
    socket: Socket
    owner: Any
    """Module or class that defines the original."""
    original: Callable[..., Any]
    half_precision: bool
    """Whether ours serves calls that `rounds` names."""
    state: str = "waiting"
    reached: int = 0
    fell_through: dict[str, int] = field(default_factory=dict)
    checked: set[Any] = field(default_factory=set)
    """Kinds of call (device, dtype, options, with or without gradients) in which ours agreed with the original."""
    places: list[Callable[[], None]] = field(default_factory=list)
    """Undo the replacement, one place each."""

    def __post_init__(self) -> None:
        # Compiled callers break their graph here: the counters and the check are not theirs to trace.
        call = torch.compiler.disable(self._call)

        @functools.wraps(self.original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        self.replacement = replacement

    @property
    def symbol(self) -> str:
        return f"{self.socket.home}.{self.socket.name}"

    @property
    def active(self) -> bool:
        return self.state in ("waiting", "checked")

    def install(self) -> None:
        """Into the owner, and wherever the framework holds the same object by name."""
        key = self.socket.name.rpartition(".")[2]
        if getattr(self.owner, key) is not self.replacement:
            before = vars(self.owner).get(key, _MISSING)
            # What a class holds already bound (the apply of an autograd.Function) takes no self.
            static = inspect.isclass(self.owner) and (
                isinstance(before, staticmethod) or inspect.ismethod(self.original) or inspect.isbuiltin(self.original)
            )
            setattr(self.owner, key, staticmethod(self.replacement) if static else self.replacement)
            self.places.append(
                lambda: delattr(self.owner, key) if before is _MISSING else setattr(self.owner, key, before)
            )
        for holder, name in _holders(self.framework, self.original):
            _put(holder, name, self.replacement)
            self.places.append(functools.partial(_put, holder, name, self.original))

    def remove(self, state: str = "removed") -> None:
        """The original everywhere, also where a module imported the replacement after `install`."""
        self.state = state
        while self.places:
            self.places.pop()()
        for holder, name in _holders(self.framework, self.replacement):
            _put(holder, name, self.original)

    def row(self) -> Row:
        return Row(self.symbol, self.state, len(self.places), self.reached, dict(self.fell_through))

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active or _checking.on:  # someone kept the replacement, or it is part of another's original
            return self.original(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        try:
            plain(tensors)
            if not self.half_precision and self.socket.rounds(tensors):
                raise Unsupported("half precision: ours has other bits, patch(..., half_precision=True) takes them")
            kind = self._kind(tensors, args, kwargs)
            if kind not in self.checked:
                difference = self._check(tensors, args, kwargs)
                if difference is not None:
                    self.remove(f"rejected: {difference}")
                    warnings.warn(
                        f"rlhf_fast.patch: {self.symbol} stays the original: {difference}", RuntimeWarning, stacklevel=4
                    )
                    return self.original(*args, **kwargs)
                self.checked.add(kind)
                self.state = "checked"
            found = self.socket.ours(*args, **kwargs)
        except DECLINED as error:
            self._note(str(error) if isinstance(error, Unsupported) else f"{type(error).__name__}: {error}")
        else:
            self.reached += 1
            return found
        return self.original(*args, **kwargs)

    def _note(self, reason: str) -> None:
        if len(self.fell_through) >= REASONS:  # some name shapes or rows, which never end
            reason = reason if reason in self.fell_through else "other reasons"
        self.fell_through[reason] = self.fell_through.get(reason, 0) + 1

    def _kind(self, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        options = [*args, *kwargs.values()]
        if args and isinstance(args[0], torch.nn.Module):
            options += vars(args[0]).values()
        switches = tuple(x for x in options if x is None or isinstance(x, (str, bool)))
        layout = tuple((x.device.type, x.dtype, x.dim()) for x in tensors)
        return wants_gradients(tensors), layout, switches, tuple(kwargs)

    def _check(self, tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """How ours differs from the original on these inputs, or None. Leaves inputs, graph and random numbers alone.

        Raises Unsupported when there is nothing to compare with.
        """
        if tensors and not undispatched(tensors[0]):
            # Such as selective checkpointing, which counts the ops of the caller.
            raise Unsupported("not checked yet, and a dispatch mode sees every op")
        cuda = sorted({x.device.index for x in tensors if x.is_cuda})
        if cuda and torch.cuda.is_current_stream_capturing():
            raise Unsupported("not checked yet, and a CUDA graph is being captured")
        args, kwargs = self._few_rows(args, kwargs)
        wants = wants_gradients(tensors)
        failure = None
        try:  # first, since it may decline; ours changes no argument
            ours = recorded(self.socket.ours, args, kwargs, wants, cuda, copies=False)
        except DECLINED:
            raise
        except Exception as error:
            failure = f"ours raises {type(error).__name__}: {error}"
        _checking.on = True
        try:
            theirs = recorded(self.original, args, kwargs, wants, cuda, copies=True)
        except Exception as error:  # the caller gets it from the real call
            raise Unsupported(f"the original raises {type(error).__name__}") from error
        finally:
            _checking.on = False
        if failure is not None:
            return failure
        dtypes = [x.dtype for x in tensors]
        return compare(ours, theirs, self._counted(args, kwargs), self.socket.constant, dtypes)

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        return inspect.signature(self.socket.ours).bind(*args, **kwargs)

    def _counted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        counts = self.socket.counts
        if counts is None:
            return None
        given = self._bound(args, kwargs).arguments
        found = given.get(counts) if isinstance(counts, str) else counts(given)
        return None if found is None else found.detach() != 0

    def _few_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.socket.rows:
            return args, kwargs
        bound = self._bound(args, kwargs)
        given = {k: bound.arguments[k] for k in self.socket.rows if bound.arguments.get(k) is not None}
        leading = min(x.dim() for x in given.values())
        left = CHECKED_ROWS
        cut: list[slice] = []
        shape = next(iter(given.values())).shape
        for d in reversed(range(leading if leading < len(shape) else leading - 1)):
            cut.insert(0, slice(0, max(1, left)))
            left //= max(1, min(left, shape[d]))
        for k, x in given.items():
            bound.arguments[k] = x[tuple(cut)]
        return bound.args, bound.kwargs


def _put(holder: dict[str, Any], name: str, value: Any) -> None:
    holder[name] = value


def _holders(framework: str, target: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """(namespace or registry, key) of every place in the imported modules of a framework that holds `target`."""
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.partition(".")[0] != framework:
            continue
        for name, value in list(vars(module).items()):
            if value is target:
                yield vars(module), name
            elif type(value) is dict and not name.startswith("__"):
                yield from ((value, key) for key, entry in list(value.items()) if entry is target)


_active: dict[str, list[Patched]] = {}


def install(
    framework: Framework,
    modules: Mapping[str, ModuleType] | None = None,
    half_precision: bool = False,
    homes: Sequence[str] | None = None,
) -> Table:
    """Install every socket of a framework (in `homes`, when given) whose module can be imported.

    Raises ImportError when none can; warns outside of the supported versions.
    """
    patched = _active.setdefault(framework.name, [])
    table = Table()
    for socket in framework.sockets:
        if homes is not None and socket.home not in homes:
            continue
        symbol = f"{socket.home}.{socket.name}"
        try:
            owner, original = _find(socket, modules)
        except (ImportError, AttributeError) as error:
            table.append(Row(symbol, f"absent: {error}", 0, 0, {}))
            continue
        known = [p for p in patched if p.owner is owner and p.socket is socket]
        if not known:
            known = [Patched(framework.name, socket, owner, original, half_precision)]
            patched += known
        known[0].half_precision = half_precision
        if known[0].active:
            known[0].install()
        table.append(known[0].row())
    if all(row.state.startswith("absent") for row in table):
        raise ImportError(f"patch: nothing of {framework.name} could be imported:\n{table}")
    _check_version(framework)
    return table


def install_on_import(framework: Framework, half_precision: bool) -> None:
    """Install what is imported already now, and the sockets of every other module as soon as it has been imported."""
    homes = {socket.home for socket in framework.sockets}
    loaded = [home for home in homes if home in sys.modules]
    if loaded:
        install(framework, half_precision=half_precision, homes=loaded)
    _Finder.withdraw(framework.name)
    sys.meta_path.insert(0, _Finder(framework, half_precision, homes - set(loaded)))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the other finders find, and has each module in `homes` patched after its first import."""

    def __init__(self, framework: Framework, half_precision: bool, homes: set[str]) -> None:
        self.framework = framework
        self.half_precision = half_precision
        self.homes = homes

    @staticmethod
    def withdraw(name: str) -> None:
        sys.meta_path[:] = [f for f in sys.meta_path if not (isinstance(f, _Finder) and f.framework.name == name)]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.homes:
            return None
        self.homes.remove(fullname)  # the search below comes here again
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads a module with its own loader, then patches it."""

    def __init__(self, own: importlib.abc.Loader, finder: _Finder) -> None:
        self.own = own
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        install(self.finder.framework, half_precision=self.finder.half_precision, homes=[module.__name__])


def uninstall(name: str) -> Table:
    """Put every original of a framework back; returns the last counts."""
    _Finder.withdraw(name)
    patched = _active.pop(name, [])
    for p in reversed(patched):
        p.remove("rejected" if p.state.startswith("rejected") else "removed")
    return Table(p.row() for p in patched)


def follow(name: str, namespace: dict[str, Any]) -> None:
    """Replace the names in a module outside of the framework that hold its originals; `uninstall` puts them back."""
    for p in _active.get(name, []):
        for key, value in list(namespace.items()):
            if p.active and value is p.original:
                namespace[key] = p.replacement
                p.places.append(functools.partial(_put, namespace, key, p.original))


def status(name: str | None = None) -> Table:
    """Calls that reached ours and calls that went to the original, per symbol, of one framework or of all that are patched."""
    return Table(p.row() for key, patched in _active.items() if name in (None, key) for p in patched)


def _find(socket: Socket, modules: Mapping[str, ModuleType] | None) -> tuple[Any, Any]:
    owner: Any = modules.get(socket.home) if modules is not None else None
    if owner is None:
        owner = sys.modules.get(socket.home) or importlib.import_module(socket.home)
    home = owner.__name__
    *classes, name = socket.name.split(".")
    for each in classes:
        owner = getattr(owner, each)
        if owner.__module__ != home:
            raise AttributeError(f"{each} is defined in {owner.__module__}")
    return owner, getattr(owner, name)


def _check_version(framework: Framework) -> None:
    try:
        module = sys.modules.get(framework.name) or importlib.import_module(framework.name)
        found = vars(module).get("__version__") or importlib.metadata.version(framework.name)
    except ImportError:  # of the package, or of its metadata
        found = "unknown"
    first, end = framework.versions
    if not (numbers(first) <= numbers(found) < numbers(end)):
        warnings.warn(
            f"rlhf_fast.patch: found {framework.name} {found}, expected >={first},<{end}; every symbol is still checked "
            "against the original at its first call",
            RuntimeWarning,
            stacklevel=4,
        )


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, three at most."""
    found = []
    for part in version.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)
