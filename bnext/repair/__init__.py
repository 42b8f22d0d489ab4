"""What any model gets without detectron2: a comparison of statistics, and what comes of it."""
