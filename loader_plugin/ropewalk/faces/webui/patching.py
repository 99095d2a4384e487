"""Replacing functions of a running program, so that everyone who holds them gets the new ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import FunctionType, ModuleType
from typing import Any

from ropewalk.faces.webui.tracebacks import drop_our_frames

MARK = "__ropewalk__"


class HookError(Exception):
    """A hook cannot attach to this version of the web UI; the message says what is missing."""


def require(module: ModuleType, *names: str) -> None:
    """Raises HookError if the module lacks one of the names."""
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise HookError(f"{module.__name__} has no {', '.join(missing)}")


def is_patched(function: Any) -> bool:
    """True for a function made by `wrap` or changed by `swap`."""
    return hasattr(function, MARK)


def wrap(module: ModuleType, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `module.name` by make(old function), once. For functions that are always looked up by that name.

    Raises:
        HookError: the module has no such function.
    """
    require(module, name)
    original = getattr(module, name)
    if is_patched(original):
        return
    new = wraps(original)(_leaving_no_frames(make(original)))
    setattr(new, MARK, True)
    setattr(module, name, new)


def swap(module: ModuleType, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Give the function `module.name` the behaviour of make(old function), once.

    The function object stays and gets another code object, so that the change also reaches modules that have imported
    it by name: an extension is loaded long after them. make receives a working copy of the old function; if that is a
    coroutine function, it must return one.

    Raises:
        HookError: there is no such function, or not a plain one (a generator, a closure).
    """
    require(module, name)
    function = getattr(module, name)
    if is_patched(function):
        return
    if not isinstance(function, FunctionType) or function.__closure__ or inspect.isgeneratorfunction(function):
        raise HookError(f"{module.__name__}.{name} is not a plain function")
    original = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    function.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    function.__defaults__ = None
    # The new code may refer only to its own parameters: its globals remain those of the web UI.
    function.__kwdefaults__ = {"ropewalk_replacement": make(original), "ropewalk_drop_frames": drop_our_frames}
    stand_in = _await_replacement if inspect.iscoroutinefunction(function) else _call_replacement
    function.__code__ = stand_in.__code__
    setattr(function, MARK, True)


def _call_replacement(
    *args: Any, ropewalk_replacement: Callable[..., Any], ropewalk_drop_frames: Callable[..., None], **options: Any
) -> Any:
    try:
        return ropewalk_replacement(*args, **options)
    except BaseException as error:
        ropewalk_drop_frames(error)
        raise


async def _await_replacement(
    *args: Any, ropewalk_replacement: Callable[..., Any], ropewalk_drop_frames: Callable[..., None], **options: Any
) -> Any:
    try:
        return await ropewalk_replacement(*args, **options)
    except BaseException as error:
        ropewalk_drop_frames(error)
        raise


def _leaving_no_frames(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function or generator function, leaving no trace of ours in the errors of what it wraps."""

    def call(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except BaseException as error:
            drop_our_frames(error)
            raise

    def generate(*args: Any, **options: Any) -> Any:
        try:
            return (yield from function(*args, **options))
        except BaseException as error:
            drop_our_frames(error)
            raise

    return generate if inspect.isgeneratorfunction(function) else call
