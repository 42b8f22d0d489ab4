"""The three ways to bring data sets, as datasets/README.md shows them, in a process that finds nothing by itself."""

import json
import os
import re
import shlex
import subprocess
import sys

from PIL import Image

from tests import tiny
from tests.evaluation.own_sets import SIDE, make_set

TEXT = (tiny.ROOT / "datasets/README.md").read_text().partition("## Your own")[2].partition("## digits")[0]
CONFIG, MODULE, SCRIPT = re.findall(r"```\w+\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [shlex.split(line) for line in re.findall(r"^    bnext (check-data .*)$", TEXT, flags=re.MULTILINE)]
ENVIRONMENT = f"def setup_environment():\n    pass\n\n{MODULE}".replace("our_", "environment_")
# As the installed script has it: neither the working directory nor the checkout's folder in front.
RUN = """
import json, os, sys
sys.path = [path for path in sys.path if path not in ("", os.getcwd())]
from bnext.cli.main import main
sys.exit(max(main(words) for words in json.loads(sys.argv[1])))
"""


def test_the_readmes_commands_know_the_sets(tmp_path):
    for number, split in enumerate(("train", "val")):
        content = make_set(number)
        (tmp_path / "my" / split).mkdir(parents=True)
        (tmp_path / f"my/{split}.json").write_text(json.dumps(content))
        for image in content["images"]:
            Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "my" / split / image["file_name"])
    for name, text in (("my.yaml", CONFIG), ("my_sets.py", MODULE), ("environment.py", ENVIRONMENT)):
        (tmp_path / name).write_text(text)

    commands = [*COMMANDS, ["check-data", "--dataset", "environment_val"]]
    commands.append(["check-data", "--json", "my/train.json", "--folder", "my/train"])
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT), "PYTHONWARNINGS": "ignore"}
    environment["DETECTRON2_ENV_MODULE"] = str(tmp_path / "environment.py")

    command = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\w+): no fault", done.stdout, flags=re.MULTILINE)
    assert found == ["my_train", "my_val"] * 2 + ["our_train", "our_val", "environment_val", "train"]
    assert len(COMMANDS) == 3
    compile(SCRIPT, "datasets/README.md", "exec")
