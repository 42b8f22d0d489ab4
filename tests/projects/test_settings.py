"""Every file of settings is read by its study, those for a GPU, too."""

import pytest
from leak_setting import LeakSetting
from mode_trials import ModeSetting
from size_setting import SizeSetting
from understanding_setting import UnderstandingSetting

from bnext.studies.setting import load_setting
from tests.tiny import ROOT

STUDIES = {
    "Leakage": LeakSetting,
    "NormalizationBatchSize": SizeSetting,
    "SmartBatchNorm": ModeSetting,
    "UnderstandingBatchNorm": UnderstandingSetting,
}
FILES = [
    (study, path.name)
    for study in STUDIES
    for path in sorted((ROOT / "projects" / study / "configs").glob("*.yaml"))
    if "_BASE_" not in path.read_text()
]


@pytest.mark.parametrize(("study", "file"), FILES, ids="/".join)
def test_settings_are_read_by_their_study(study, file):
    path = ROOT / "projects" / study / "configs" / file
    setting = load_setting(STUDIES[study], path, ["device=cpu"])
    assert setting.dataset in path.read_text()
