"""Corruptions of pictures: the fifteen of COCO-C, inversion and low contrast, each in five severities."""
