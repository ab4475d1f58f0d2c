"""``report``: run folders -> one HTML file that needs nothing but a browser."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from headstart.errors import RunError
from headstart.files import write_text
from headstart.verbs.report import comparison, curves, page, priors, samples
from headstart.verbs.report.parts import Looks, Pictures
from headstart.verbs.report.runs import read_runs
from headstart.verbs.report.statistics import RULE


def report(
    runs: Sequence[Path | str] | Path | str,
    out: Path | str = "report.html",
    *,
    images: int = 24,
    threshold: float = 0.5,
) -> Path:
    """Write a self-contained HTML report on run folders of any kind and state, and return its path.

    What a folder lacks (an evaluation, a log, the photos) is named in the report together with the command
    that makes it. The file loads nothing from elsewhere.

    Args:
        runs: folders that ``pretrain`` and ``finetune`` made; runs that differ in their seed form a group. A folder
            that ``compare`` made stands for all its runs, and brings its verdict.
        out: the HTML file; replaced if it exists.
        images: photos shown with detections, and at most as many with proposals.
        threshold: detections with at least this score are drawn; where an image has none, its best one.

    Raises:
        RunError: a folder is not a run, none is given, or ``out`` can't be written.
    """
    if images < 0 or not 0 <= threshold <= 1:
        raise RunError(f"report: images={images}, threshold={threshold}; expected images >= 0, threshold in 0..1")
    folders = [runs] if isinstance(runs, str | Path) else list(runs)
    out = Path(out)
    if out.is_dir():
        raise RunError(f"{out}: is a folder; expected the name of an HTML file, for example {out / 'report.html'}")

    inside, comparisons = comparison.run_folders(folders)
    records = read_runs(inside)
    looks = Looks(records)
    photos = Pictures()
    results = page.results(records, looks, photos, images, threshold)
    losses, loss_keys = curves.finetuning(records, looks)
    boxes, box_notes = samples.proposals(records, photos, min(images, 8))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        created=datetime.now().astimezone(),
        runs=records,
        run_rows=page.run_rows(records),
        comparisons=[
            comparison.answered(path, content, records, looks, f"compare{i}")
            for i, (path, content) in enumerate(comparisons)
        ],
        results=results,
        missing=page.missing(records, results),
        pretraining=curves.pretraining(records),
        curves=losses,
        curve_keys=loss_keys,
        proposals=boxes,
        proposal_notes=box_notes,
        priors=priors.priors(records, photos, images),
        settings=page.settings(records),
        environments=page.environments(records),
        photos=list(photos.by_path.values()),
        rule=RULE,
    )
    write_text(out, html)
    return out
