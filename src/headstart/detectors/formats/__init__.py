"""Weights under the key names and tensor layouts of other libraries, and back: one library a file, one line here.

Each file offers the same four functions, all pure::

    from_torchvision(state, backbone) -> Translated     # a detector's weights as that library names and orders them
    to_torchvision(state, backbone) -> dict             # the same, backwards
    model_settings(state, settings) -> dict             # what the model over there has to be set to
    loading(file) -> str                                # the lines that load the file over there

and ``torch_file(state, metadata)``, what a torch file for that library holds, where its loaders read torch files.
Those in ``FOLDERS`` are written as a folder instead, by :mod:`headstart.detectors.formats.transformers_folders`.
``originals.py`` has the names of repositories whose checkpoints are read, and for which nothing is written.
``docs/export.md`` has the tables.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from headstart.errors import SettingsError

FORMATS = {
    "torchvision": "headstart.detectors.formats.torchvision",
    "detectron2": "headstart.detectors.formats.detectron2",
    "mmdetection": "headstart.detectors.formats.mmdetection",
    "timm": "headstart.detectors.formats.timm",
    "transformers": "headstart.detectors.formats.transformers",
}
FOLDERS = ("transformers",)


def format_module(name: str) -> ModuleType:
    """Raises: SettingsError for an unknown format, with the known ones."""
    if name not in FORMATS:
        raise SettingsError(f"--to {name}: not known; choose one of {', '.join(FORMATS)}")
    return import_module(FORMATS[name])
