"""Triton's interpreter, without most of what it does again and again."""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib.metadata import version
from typing import Any


@cache
def patch_once_a_launch() -> None:
    """Let a launch replace Triton's language by the interpreter's once for each module whose functions it calls.

    Triton 3.9 looks through the whole language at every call of a device function, ``tl.sum`` and ``tl.max`` among
    them, for what it has replaced already: half of the time of a kernel of few columns. Another release's interpreter
    is left as it is.
    """
    if importlib.util.find_spec("triton") is None or not version("triton").startswith("3.9."):
        return
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # modules, by the identity of their names

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()  # the end of a launch puts the language back
        launch(self, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        """What undoes it, for the launch, whose kernel is always the first."""
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch(function)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._patch_lang = patch_once
