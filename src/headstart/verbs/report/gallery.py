"""Detections beside ground truth, on the same photos for every way of starting, each with what TIDE calls it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from headstart.datasets.detection import DetectionData
from headstart.errors import ImageError
from headstart.tide import MAIN, MEANING, Verdicts, verdicts
from headstart.verbs.report import pictures, words
from headstart.verbs.report.detections import Found, Kept, photos_to_show
from headstart.verbs.report.parts import Note, Pictures
from headstart.verbs.report.pictures import Told

FALSE = MAIN[:5]  # what a detection may be but correct
NOT_FOUND = ("Miss", "wrong")  # as verdicts calls objects
# What can be chosen: name, meaning, which kinds of boxes it stands for.
KINDS = [
    ("correct", "an object found", ("correct", "found")),
    *((name, MEANING[name], (name,)) for name in MAIN),
    ("FalsePos", MEANING["FalsePos"], FALSE),
    ("FalseNeg", MEANING["FalseNeg"], NOT_FOUND),
]


@dataclass(frozen=True)
class Choice:
    """An entry of the filter by error type; ``of``: the kinds of boxes it stands for, as the page has them."""

    name: str
    text: str
    of: str


@dataclass
class Gallery:
    """``blocks``: by label budget, its title and a row of pictures a photo; the ground truth comes first."""

    blocks: list[tuple[str, list[tuple[str, list[pictures.Picture]]]]]
    classes: list[tuple[int, str, str, str]]  # label, name, colour, dashes
    threshold: float
    starts: int = 0  # in a row, at most
    choices: list[Choice] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def shown(self) -> bool:
        return bool(self.blocks or self.notes)


def gallery(kept: Kept, photos: Pictures, images: int, threshold: float) -> Gallery:
    """The first seed of each group; ``images`` photos, spread evenly over those with objects."""
    page = Gallery([], [], threshold, notes=list(kept.notes))
    data = kept.data
    if data is None or not images:
        return page
    candidates = photos_to_show(data)
    chosen: list[tuple[int, pictures.Thumbnail]] = []
    for place in pictures.evenly_spaced(len(candidates), images):
        record = data.images[candidates[place]]
        try:
            chosen.append((candidates[place], photos.get(record.path, record.width)))
        except ImageError as error:
            page.notes.append(Note(f"Left out of the pictures: {error}"))

    for title, here in kept.by_budget():
        rows = [(data.images[index].file_name, _row(data, index, thumb, here, threshold)) for index, thumb in chosen]
        page.blocks.append((title, rows))
        page.starts = max(page.starts, len(here))
    labels = {mark.told.label for _, rows in page.blocks for _, row in rows for mark in _marks(row) if mark.told}
    page.classes = [
        (k + 1, category.name, *pictures.class_style(k + 1))
        for k, category in enumerate(data.categories)
        if k + 1 in labels
    ]
    page.choices = [_choice(name, meaning, of, page.blocks) for name, meaning, of in KINDS]
    return page


def judge(data: DetectionData, index: int, found: Found) -> Verdicts:
    """What TIDE says of one image, from all its detections, whatever their score."""
    truth = data.subset([data.images[index].id]).to_coco()
    here = found.of(index)
    return verdicts(
        truth,
        [
            {
                "image_id": truth["images"][0]["id"],
                "category_id": data.categories[label - 1].id,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for label, (x1, y1, x2, y2), score in zip(
                found.labels[here].tolist(), found.boxes[here].tolist(), found.scores[here].tolist(), strict=True
            )
        ],
    )


def _marks(row: Iterable[pictures.Picture]) -> list[pictures.Mark]:
    return [mark for shot in row for mark in shot.marks]


def _choice(name: str, meaning: str, of: Sequence[str], blocks: Sequence[tuple[str, list]]) -> Choice:
    boxes, seen = 0, set()
    for _, rows in blocks:
        for file, (_, *starts) in rows:
            count = sum(mark.told is not None and mark.told.kinds in of for mark in _marks(starts))
            boxes += count
            seen |= {file} if count else set()
    counted = f"{boxes:,} in {words.plural(len(seen), 'photo')}" if boxes else "none here"
    return Choice(name, f"{name}: {meaning} ({counted})", " ".join(of))


def _row(
    data: DetectionData, index: int, thumb: pictures.Thumbnail, here: Sequence[Found], threshold: float
) -> list[pictures.Picture]:
    judged = [judge(data, index, found) for found in here]
    starts = [_found(data, index, thumb, f, told, threshold) for f, told in zip(here, judged, strict=True)]
    return [_truth(data, index, thumb, judged), *starts]


def _truth(data: DetectionData, index: int, thumb: pictures.Thumbnail, judged: Sequence[Verdicts]) -> pictures.Picture:
    truth = data.annotations[index]
    labels = truth.labels.tolist()
    names = [data.categories[label - 1].name for label in labels]
    told = []
    for k, label in enumerate(labels):
        states = [one.objects[k] for one in judged]
        told.append(Told(label, " ".join(dict.fromkeys(states)), _found_by(states)))
    alt = f"{data.images[index].file_name}: ground truth, {words.plural(len(labels), 'object')}"
    boxes = np.asarray(truth.boxes, np.float64).reshape(-1, 4)
    return _picture(thumb, boxes, names, told, "ground truth", alt)


def _found_by(states: Sequence[str]) -> str:
    """What stands beside an object: nothing where every start found it."""
    if "crowd" in states:
        return "crowd"
    count = states.count("found")
    if count == len(states):
        return ""
    return f"{count}/{len(states)}" if len(states) > 1 else "not found"


def _found(
    data: DetectionData, index: int, thumb: pictures.Thumbnail, found: Found, judged: Verdicts, threshold: float
) -> pictures.Picture:
    """Detections that are sure enough, or else the best one, which the caption says; and the objects not found."""
    here = found.of(index)
    scores, total = found.scores[here], here.stop - here.start
    sure = int((scores >= threshold).sum())
    drawn = range(sure or min(1, total))
    kinds = ["ignored" if judged.ignored[d] else judged.detections[d] or "not judged" for d in drawn]
    missed = [k for k, state in enumerate(judged.objects) if state in NOT_FOUND]
    counts = Counter(kinds)
    listed = ", ".join(
        f"{counts[kind]} {kind}" for kind in ("correct", *FALSE, "ignored", "not judged") if counts[kind]
    )
    if sure:
        remark = f"{words.plural(sure, 'detection')}: {listed}"
        caption = f"{found.label} · {listed}"
    else:
        remark = f"best of {total}, score {scores[0]:.2f}, {kinds[0]}" if total else "no detection"
        caption = f"{found.label} · {remark}"
    if missed:
        caption += f"; {len(missed)} not found"
        remark += f"; {words.plural(len(missed), 'object')} not found"

    truth = data.annotations[index]
    labels = [int(found.labels[here][d]) for d in drawn]
    told = [
        Told(label, kind, "" if kind == "correct" else kind, "flagged" if kind in FALSE else "plain")
        for label, kind in zip(labels, kinds, strict=True)
    ]
    names = [f"{data.categories[label - 1].name} {scores[d]:.2f}" for d, label in zip(drawn, labels, strict=True)]
    for k in missed:
        state = judged.objects[k]
        told.append(Told(int(truth.labels[k]), state, form="dotted"))
        names.append("Miss" if state == "Miss" else "")
    boxes = np.concatenate([found.boxes[here][: len(drawn)], np.asarray(truth.boxes, np.float64)[missed]])
    return _picture(thumb, boxes, names, told, caption, f"{data.images[index].file_name}: {found.label}, {remark}")


def _picture(
    thumb: pictures.Thumbnail,
    boxes: np.ndarray,
    names: Sequence[str],
    told: Sequence[Told],
    caption: str,
    alt: str,
) -> pictures.Picture:
    styles = [pictures.class_style(one.label) for one in told]
    drawn = pictures.marks(thumb, boxes, styles, names, told)
    return pictures.Picture(thumb, drawn, caption, alt, len(drawn) > pictures.LABELS_UP_TO)
