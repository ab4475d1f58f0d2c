"""The data sets that papers measure on, as they are published, and the protocols: what of them is labelled, and how it
is scored. A data set is written once; a protocol is a line or two that refers to it and to the recipes of papers.

Numbers of images, boxes and classes are those of the official releases (VOC's boxes without difficult ones).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headstart.datasets.class_folders import KIT, SYNSETS, TRUTH
from headstart.datasets.splits import Source


@dataclass(frozen=True)
class Annotated(Source):
    """An annotation file and the folder of its images, below the data set's root.

    Attributes:
        count, boxes, classes: in the official release; None where not known.
        otherwise: another usual place of the file.
    """

    count: int = 0
    boxes: int | None = None
    classes: int | None = None
    otherwise: str | None = None

    def layout(self) -> dict[str, str]:
        """What should be where."""
        if self.file.endswith(".txt"):
            year = self.file.split("/")[0]
            return {
                self.file: f"the names of {self.count} images",
                f"{year}/Annotations/": "an .xml file for each of them",
                f"{year}/JPEGImages/": "a .jpg file for each of them",
            }
        said = amount(self.count, self.boxes, self.classes)
        folders = (self.images,) if self.images else ("train2017", "val2017")
        return {
            self.file: said if self.otherwise is None else f"{said}; or {self.otherwise}",
            **{f"{folder}/": "images" for folder in folders},
        }


@dataclass(frozen=True)
class ClassFolders:
    """Images whose folder is their class, as :func:`headstart.datasets.class_folders.load_class_data` reads them.

    Attributes:
        folder: below the data set's root.
        count, classes: in the official release.
        example: an image of it.
        otherwise: other layouts that do, place -> what is there.
    """

    folder: str
    count: int
    classes: int
    example: str
    otherwise: tuple[tuple[str, str], ...] = ()

    def layout(self) -> dict[str, str]:
        """What should be where."""
        here = {f"{self.folder}/{self.example}": f"{amount(self.count, None, self.classes)}, a folder each"}
        return here | dict(self.otherwise)


@dataclass(frozen=True)
class DataSet:
    """``folder``: name of the root in the official archives; ``DIR`` may be it or the folder that holds it.

    ``train`` and ``val`` are annotation files, or folders of classes.
    """

    title: str
    url: str
    folder: str
    train: tuple[Annotated, ...] | tuple[ClassFolders]
    val: tuple[Annotated, ...] | tuple[ClassFolders] = ()

    @property
    def files(self) -> tuple[Annotated | ClassFolders, ...]:
        return (*self.train, *self.val)

    @property
    def of_classes(self) -> bool:
        """Whole images have classes, and there are no boxes."""
        return isinstance(self.train[0], ClassFolders)

    def layout(self) -> str:
        """The files there should be, one a line, as in the official archives."""
        lines = {place: what for source in self.files for place, what in source.layout().items()}
        width = max(map(len, lines))
        return "\n".join([f"{self.folder}/", *(f"  {path.ljust(width)}  {what}" for path, what in lines.items())])


def amount(images: int, boxes: int | None, classes: int | None) -> str:
    """ "5000 images, 36781 boxes, 80 classes", as far as known."""
    numbers = ((images, "images"), (boxes, "boxes"), (classes, "classes"))
    return ", ".join(f"{number} {what}" for number, what in numbers if number is not None)


@dataclass(frozen=True)
class Protocol:
    """What is labelled, and how it is scored.

    Attributes:
        what: in words.
        labels: label budget of the training images, as ``--labels`` takes it; "shots" asks for ``--shots``.
        keep: share of the images to train on where a data set has no validation images of its own: they are divided
            with every class on both sides.
        metrics: what is reported, by the name of the suite of metrics.
        recipes: whose ``finetune`` section, or ``linear``, is a paper's schedule for it.
        novel: classes that are scored apart from the others.
        notes: what else there is to know.
    """

    name: str
    what: str
    data: DataSet
    metrics: dict[Suite, str]
    recipes: tuple[str, ...]
    labels: str = "all"
    keep: float | None = None
    novel: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verb(self) -> str:
        """Of :mod:`headstart`, what trains on it."""
        return "linear" if self.data.of_classes else "finetune"

    @property
    def seeded(self) -> bool:
        return self.labels != "all" or self.keep is not None

    def text(self) -> str:
        """All of it, for readers."""
        lines = [f"{self.name}: {self.what}", f"Data: {self.data.title}, {self.data.url}", self.data.layout()]
        lines += [f"Metrics ({suite}): {what}" for suite, what in self.metrics.items()]
        lines += [f"Novel classes: {', '.join(self.novel)}"] if self.novel else []
        lines += [f"Recipe: {recipe}" for recipe in self.recipes]
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(lines)


Suite = Literal["coco", "lvis", "voc07", "accuracy"]

COCO = DataSet(
    "COCO 2017",
    "https://cocodataset.org/#download",
    "coco",
    train=(Annotated("annotations/instances_train2017.json", "train2017", 118287, 860001, 80),),
    val=(Annotated("annotations/instances_val2017.json", "val2017", 5000, 36781, 80),),
)
LVIS = DataSet(
    "LVIS v1, on the images of COCO 2017",
    "https://www.lvisdataset.org/dataset",
    "coco",
    train=(Annotated("annotations/lvis_v1_train.json", "", 100170, 1270141, 1203, "lvis_v1_train.json"),),
    val=(Annotated("annotations/lvis_v1_val.json", "", 19809, 244707, 1203, "lvis_v1_val.json"),),
)
VOC = DataSet(
    "Pascal VOC 2007 and 2012",
    "http://host.robots.ox.ac.uk/pascal/VOC/",
    "VOCdevkit",
    train=(
        Annotated("VOC2007/ImageSets/Main/trainval.txt", "VOC2007/JPEGImages", 5011, 12608, 20),
        Annotated("VOC2012/ImageSets/Main/trainval.txt", "VOC2012/JPEGImages", 11540, 27450, 20),
    ),
    val=(Annotated("VOC2007/ImageSets/Main/test.txt", "VOC2007/JPEGImages", 4952, 12032, 20),),
)
FSOD_URL = "https://github.com/fanq15/Few-Shot-Object-Detection-Dataset"
FSOD_TEST = DataSet(
    "FSOD's test set",
    FSOD_URL,
    "fsod",
    train=(Annotated("annotations/fsod_test.json", "images", 14152, 35102, 200),),
)
FSOD_TRAIN = DataSet(
    "FSOD's training set",
    FSOD_URL,
    "fsod",
    train=(Annotated("annotations/fsod_train.json", "images", 52350, 147489, 800),),
)
SODA10M = DataSet(
    "SODA10M, the labelled part",
    "https://soda-2d.github.io/documentation.html",
    "SSLAD-2D",
    train=(Annotated("labeled/annotations/instance_train.json", "labeled/train", 5000, None, 6),),
    val=(Annotated("labeled/annotations/instance_val.json", "labeled/val", 5000, None, 6),),
)
IMAGENET = DataSet(
    "ImageNet-1k (ILSVRC 2012)",
    "https://image-net.org/download.php",
    "ILSVRC2012",
    train=(
        ClassFolders(
            "train",
            1281167,
            1000,
            "n01440764/n01440764_10026.JPEG",
            (("train/n01440764.tar", "or a tar file each, as ILSVRC2012_img_train.tar has them"),),
        ),
    ),
    val=(
        ClassFolders(
            "val",
            50000,
            1000,
            "n01440764/ILSVRC2012_val_00000293.JPEG",
            (
                (
                    "val/ILSVRC2012_val_00000001.JPEG",
                    "or without folders, as ILSVRC2012_img_val.tar has them, and then",
                ),
                (f"{KIT}/{TRUTH}", "their classes, in order"),
                (f"{KIT}/{SYNSETS}", "the names of the classes"),
            ),
        ),
    ),
)

VOC_METRICS: dict[Suite, str] = {
    "coco": "AP, AP50, AP75 of boxes, as papers on transformer detectors have it",
    "voc07": "AP50, VOC's own; AP and AP75 as papers that evaluate with detectron2 have it",
}
COCO_METRICS: dict[Suite, str] = {"coco": "AP, AP50, AP75, and by size, of boxes and masks"}
BOXES: dict[Suite, str] = {"coco": "AP, AP50, AP75 of boxes"}
CLASS_COVER = "images that bring a class come first; the papers draw without that, which matters for few images alone"
NOVEL = (
    ("bird", "bus", "cow", "motorbike", "sofa"),
    ("aeroplane", "bottle", "cow", "horse", "sofa"),
    ("boat", "cat", "motorbike", "sheep", "sofa"),
)


def _minicoco(percent: int, recipes: tuple[str, ...]) -> Protocol:
    return Protocol(
        f"minicoco_{percent}",
        f"{percent} % of COCO's training images",
        COCO,
        COCO_METRICS,
        recipes,
        labels=f"{percent}%",
        notes=(CLASS_COVER,),
    )


def _minivoc(percent: int) -> Protocol:
    return Protocol(
        f"minivoc_{percent}",
        f"{percent} % of the training images of VOC 07+12",
        VOC,
        VOC_METRICS,
        ("proseco_table1_minivoc",),
        labels=f"{percent}%",
        notes=(CLASS_COVER,),
    )


def _few_shot(split: int) -> Protocol:
    return Protocol(
        f"voc_split{split}",
        f"K boxes of each of VOC's 20 classes, split {split} of the novel ones",
        VOC,
        {"voc07": "AP50 of the novel classes, the others, and all"},
        ("adept_table2_joint", "adept_table2_separate", "adept_table2_soco"),
        labels="shots",
        novel=NOVEL[split - 1],
        notes=(
            "K is usually 1, 2, 3, 5 and 10; the three splits have the same boxes, and differ in the classes called "
            "novel",
            "boxes that are not chosen are not labelled: their image has the chosen ones alone",
        ),
    )


def _fsod(name: str, data: DataSet, recipe: str) -> Protocol:
    return Protocol(
        name,
        f"80 % of {data.title} to train on, 20 % to score, every class on both sides",
        data,
        BOXES,
        (recipe,),
        keep=0.8,
    )


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "coco",
            "COCO, all training images",
            COCO,
            COCO_METRICS,
            (
                "soco_table1_100ep",
                "soco_table1_100ep_2x",
                "aligndet_retinanet",
                "detreg_coco",
                "updetr_300ep",
                "proseco_table10_coco_1x",
            ),
        ),
        _minicoco(1, ("proseco_table1_minicoco_1", "detreg_coco_1", "joindet_coco_1", "adept_table1_joint_mini")),
        _minicoco(5, ("proseco_table1_minicoco_5", "soco_table8_100ep")),
        _minicoco(
            10,
            (
                "proseco_table1_minicoco_10",
                "soco_table8_100ep",
                "detreg_coco_10",
                "joindet_coco_10",
                "adept_table1_joint_mini",
            ),
        ),
        _minicoco(50, ("soco_table12_half",)),
        Protocol(
            "voc0712",
            "VOC 2007 and 2012 trainval to train on, VOC 2007 test to score",
            VOC,
            VOC_METRICS,
            (
                "proseco_table1_voc",
                "detreg_imagenet_voc",
                "joindet_coco_voc",
                "aligndet_retinanet_voc",
                "soco_table3_100ep",
            ),
        ),
        _minivoc(5),
        _minivoc(10),
        Protocol(
            "lvis",
            "LVIS v1, all training images",
            LVIS,
            {"lvis": "AP, APr, APc, APf of boxes and masks"},
            ("soco_table6_lvis", "soco_table6_lvis_2x"),
            notes=("the validation set has images of train2017 too: both folders are needed",),
        ),
        _fsod("fsod_test", FSOD_TEST, "proseco_table1_fsod_test"),
        _fsod("fsod_train", FSOD_TRAIN, "proseco_table1_fsod_train"),
        Protocol(
            "soda10m",
            "SODA10M, the 5000 labelled training images",
            SODA10M,
            BOXES,
            ("adept_table1_joint_soda10m", "adept_table1_separate_soda10m"),
        ),
        Protocol(
            "imagenet_linear",
            "ImageNet, a linear classifier of whole images on the fixed backbone",
            IMAGENET,
            {"accuracy": "top-1 and top-5 accuracy"},
            ("soco_table11_linear",),
            notes=("only the backbone is measured: FPN and heads, which detectors gain from, have no part in it",),
        ),
        _few_shot(1),
        _few_shot(2),
        _few_shot(3),
    )
}
