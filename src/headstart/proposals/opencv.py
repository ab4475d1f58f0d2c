"""Selective Search by OpenCV (opencv-contrib, ximgproc): Uijlings et al., IJCV 2013.

One segmentation (Felzenszwalb and Huttenlocher, IJCV 2004) with all three of its parameters, and one grouping
by colour + texture + size + fill with equal weights: SoCo appendix A, ADePT section 4.1.1. OpenCV's own
presets ("single", "fast", "quality") fix min_size at 100 and are not used.

- OpenCV's k on pixel values 0..255 is skimage's ``scale`` (which it divides by 255 for values 0..1).
- OpenCV's graph joins 4 neighbours a pixel, skimage's 8, so that the segments differ (OpenCV's are more).
- OpenCV segments and compares one and the same image; the usual Python implementation segments RGB and
  compares in HSV. HSV, as in OpenCV's single strategy, is the default here: on everyday photos (COCO) both
  find the same share of the labelled objects, on microscope images (BCCD) HSV found 3.5 times as many as RGB.
- OpenCV orders boxes by an unseeded ``rand()``. Only their set is reproducible, so they are put in an order
  of ours: largest area first (what was grouped last, which Uijlings et al. prefer too), then x1, y1, x2, y2.
"""

from __future__ import annotations

import cv2
import numpy as np

from headstart.errors import SettingsError


class OpenCVSelectiveSearch:
    name = "opencv"

    def __init__(self, scale: float = 500.0, sigma: float = 0.9, min_size: int = 10, colour: str = "hsv") -> None:
        """
        Args:
            scale: Felzenszwalb's k, for pixel values 0..255.
            sigma: blur before the segmentation, px.
            min_size: smallest segment, in pixels.
            colour: "hsv" or "rgb".

        Raises:
            SettingsError: the installed cv2 has no ximgproc.
        """
        if not hasattr(cv2, "ximgproc"):
            raise SettingsError(
                f"engine=opencv needs cv2.ximgproc, which the installed OpenCV {cv2.__version__} lacks. All "
                "opencv wheels write to one folder, and one without the contrib modules came last. Mend it:\n"
                "  pip uninstall -y opencv-python opencv-python-headless opencv-contrib-python "
                "opencv-contrib-python-headless\n"
                "  pip install opencv-contrib-python-headless"
            )
        self.version = f"1+opencv-{cv2.__version__}"
        self.scale, self.sigma, self.min_size, self.colour = scale, sigma, min_size, colour

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (N, 4) float32 xyxy, no duplicates, largest first. ``rng`` is not used."""
        find = cv2.ximgproc.segmentation
        search = find.createSelectiveSearchSegmentation()
        search.addImage(cv2.cvtColor(image, cv2.COLOR_RGB2HSV) if self.colour == "hsv" else image)
        search.addGraphSegmentation(find.createGraphSegmentation(self.sigma, self.scale, self.min_size))
        search.addStrategy(
            find.createSelectiveSearchSegmentationStrategyMultiple(  # four equal weights
                find.createSelectiveSearchSegmentationStrategyColor(),
                find.createSelectiveSearchSegmentationStrategyTexture(),
                find.createSelectiveSearchSegmentationStrategySize(),
                find.createSelectiveSearchSegmentationStrategyFill(),
            )
        )
        found = np.asarray(search.process(), np.int64).reshape(-1, 4)  # x, y, width, height
        x1, y1, width, height = np.unique(found, axis=0).T
        boxes = np.stack([x1, y1, x1 + width, y1 + height], axis=1)
        order = np.lexsort((boxes[:, 3], boxes[:, 2], y1, x1, -width * height))
        return boxes[order].astype(np.float32)
