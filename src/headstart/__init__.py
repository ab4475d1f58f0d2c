"""Headstart pretrains whole object detectors, heads included, on images nobody has labelled.

The verbs are the whole public surface; each is also a command of the same name (``preview`` is
``headstart propose --preview``)::

    import headstart

    run = headstart.pretrain("faster_rcnn", images="PHOTOS/", method="soco", backbone="resnet18")
    tuned = headstart.finetune(run.path, train="train.json", val="val.json", labels="10%")
    headstart.report([run.path, tuned.path])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Verbs are imported when first used: `import headstart` stays free of torch.
_VERBS = {
    "propose": "headstart.verbs.propose",
    "preview": "headstart.verbs.preview",
    "pretrain": "headstart.verbs.pretrain",
    "finetune": "headstart.verbs.finetune",
    "evaluate": "headstart.verbs.evaluate",
    "linear": "headstart.verbs.linear",
    "compare": "headstart.verbs.compare",
    "report": "headstart.verbs.report",
    "export": "headstart.verbs.export",
}

__all__ = [
    "__version__",
    "compare",
    "evaluate",
    "export",
    "finetune",
    "linear",
    "pretrain",
    "preview",
    "propose",
    "report",
]

if TYPE_CHECKING:
    from headstart.verbs.compare import compare
    from headstart.verbs.evaluate import evaluate
    from headstart.verbs.export import export
    from headstart.verbs.finetune import finetune
    from headstart.verbs.linear import linear
    from headstart.verbs.pretrain import pretrain
    from headstart.verbs.preview import preview
    from headstart.verbs.propose import propose
    from headstart.verbs.report import report


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(import_module(_VERBS[name]), name)
    raise AttributeError(f"module 'headstart' has no attribute {name!r}")
