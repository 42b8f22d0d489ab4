"""What every test relies on: few threads, and no data set or cache of the person who runs the tests."""

from __future__ import annotations

import os

# Before torch and detectron2 are imported. Tests that need data sets name their own folder.
os.environ["DETECTRON2_DATASETS"] = "/nonexistent/datasets"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: a second thread costs more than it brings
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

torch.set_num_threads(1)
