from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import make_study

from headstart.verbs.report import report


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One label budget, three seeds of each way of starting. Tests read it and don't change it."""
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def study_page(study: list[Path]) -> Path:
    return report(study, study[0].parent.parent / "report.html", images=6)
