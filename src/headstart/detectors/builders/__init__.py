"""Detectors built with torch, torchvision and timm alone.

Nothing in here may import from the rest of Headstart: what a detector needs of these files is copied, as text, into the
``load_in_torchvision.py`` of its run folder (:mod:`headstart.detectors.plain_code`), so that people can build the same
detector without us.
"""
