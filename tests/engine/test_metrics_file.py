"""metrics.json: every line is JSON, whatever was measured."""

import json
import math

from detectron2.utils.events import EventStorage, JSONWriter

from bnext.engine.metrics_file import MetricsWriter


def refuse(name):
    raise ValueError(f"{name} is no JSON")


def write(path, kind):
    writer = kind(str(path))
    with EventStorage(0) as storage:
        for step in range(40):
            storage.put_scalar("loss", math.nan if step > 30 else 1.0 / (step + 1))
            storage.put_scalar("lr", math.inf if step > 30 else 0.1, smoothing_hint=False)
            if step % 20 == 19:
                writer.write()
            storage.step()
        storage.put_scalars(**{"bbox/AP": 1.5, "bbox/APl": math.nan, "bbox/APs": -math.inf}, smoothing_hint=False)
        writer.write()
        writer.write()  # nothing is new
    writer.close()
    return path.read_text().splitlines()


def test_no_number_is_null_and_all_else_is_as_detectron2_writes_it(tmp_path):
    ours, theirs = write(tmp_path / "ours.json", MetricsWriter), write(tmp_path / "theirs.json", JSONWriter)
    values = [json.loads(line, parse_constant=refuse) for line in ours]
    expected = [json.loads(line, parse_constant=lambda name: None) for line in theirs]
    assert values == expected
    assert values[-1] == {"bbox/AP": 1.5, "bbox/APl": None, "bbox/APs": None, "iteration": 40}
    assert "NaN" in "".join(theirs)
