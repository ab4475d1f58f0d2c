"""Images and annotations: folders, COCO, Pascal VOC, label budgets, and the generated scenes."""
