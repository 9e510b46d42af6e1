"""The start of a process that uses unsloth; this module imports nothing that unsloth has to come before."""

from __future__ import annotations

import importlib
import os
import pickle
from multiprocessing.connection import Connection


def serve_with_unsloth(connection: Connection, arguments: bytes, folder: str) -> None:
    """Import unsloth, then serve a trial (:func:`benchmarks.step.process.serve`); unsloth's code goes to ``folder``."""
    os.environ["UNSLOTH_COMPILE_LOCATION"] = folder
    try:
        importlib.import_module("unsloth")
    except Exception as error:
        connection.send((None, f"{type(error).__name__}: {error}".splitlines()[0]))
        return
    from benchmarks.step.process import serve

    serve(connection, *pickle.loads(arguments))
