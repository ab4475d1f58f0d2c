"""Functions that numba compiles at their first call and keeps, compiled, for later starts.

numba keeps them beside the source, or in the user's cache folder where that can't be written. Where neither can
(a read-only container without a home) they go into a private folder of this process and of those it starts.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numba

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

# Parts of entry points; what they become is kept with those.
inner = numba.njit(**_OPTIONS)
# Small ones that are called in hot loops: a call passes every field of every array.
inlined = numba.njit(forceinline=True, **_OPTIONS)


def entry(function: Callable) -> Any:
    """Compile ``function`` when it is first called; load it, from then on, in every process of this user."""
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # numba found no folder that it can write
        if "NUMBA_CACHE_DIR" not in os.environ:
            # Not a fixed name in the temporary folder: numba unpickles what it finds, so nobody else may put it there.
            folder = tempfile.mkdtemp(prefix="headstart-compiled-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            os.environ["NUMBA_CACHE_DIR"] = folder  # workers inherit it
            numba.config.reload_config()
            return entry(function)
        return numba.njit(**_OPTIONS)(function)


def is_kept(function: Any) -> bool:
    """Whether an :func:`entry` was compiled before, by this process or by an earlier one, as far as can be told."""
    cache_file = getattr(getattr(function, "_cache", None), "_cache_file", None)
    index = getattr(cache_file, "_index_path", None)
    return bool(function.signatures) or (index is not None and os.path.exists(index))
