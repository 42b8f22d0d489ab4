"""Claims about speed, one file each, on one harness: `python -m bench`.

A new claim is a file with its `ROWS`, and its name in `CLAIMS` of __main__.py. A row has a name, and `run(setting)`,
which gives results of record.py: a `Comparison` of two arms (harness.py), their peak memory (memory.py), or their
collectives (traffic.py). What a whole re-estimation costs against fvcore's is apart, as it takes minutes:
`python -m bench.population_statistics`; so are COCO's metrics, `python -m bench.evaluation_speed`, and the seconds of
whole runs besides computing, `python -m bench.whole_runs`.
"""

import warnings

# fvcore's focal loss and detectron2's Box2BoxTransform are scripted at import.
warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated", FutureWarning)
