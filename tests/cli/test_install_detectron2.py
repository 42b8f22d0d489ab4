"""The installer of detectron2: what it refuses, what it writes, and that the repairs of our build hold."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from bnext.cli import install_detectron2 as installer
from bnext.cli.install_detectron2 import PATCHES, InstallError
from tests import tiny

SITE = Path(installer.find_installed() or "/nonexistent/__init__.py").parent


def is_our_build() -> bool:
    """Whether the detectron2 that is imported, which may be a folder on the path, is what the tool has installed."""
    try:
        distribution = importlib.metadata.distribution("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return False
    is_made_by_us = installer.GENERATOR in (distribution.read_text("WHEEL") or "")
    return is_made_by_us and Path(str(distribution.locate_file("detectron2"))) == SITE


needs_our_build = pytest.mark.skipif(not is_our_build(), reason="the installed detectron2 is not of install_detectron2")


@pytest.fixture
def own_index(tmp_path, monkeypatch):
    """pip sees this folder and nothing else, whatever the machine's configuration says."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_NO_CACHE_DIR": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return folder


def write_archive(folder: Path, files: dict[str, str]) -> Path:
    archive = folder / f"{installer.NAME}-{installer.VERSION}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"{installer.NAME}-{installer.VERSION}/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return archive


def make_sources() -> dict[str, bytes]:
    """A tiny package in which every patch finds its text twice."""
    sources = {"LICENSE": b"terms", "detectron2/__init__.py": b'__version__ = "0.6"\n'}
    for file, old, _ in PATCHES:
        sources[f"detectron2/{file}"] = sources.get(f"detectron2/{file}", b"") + f"{old}\n{old}\n".encode()
    return sources


class TestDownload:
    def test_changed_archive_is_refused_before_anything_of_it_runs(self, own_index, tmp_path):
        ran = tmp_path / "ran"
        archive = write_archive(own_index, {"setup.py": f"open({str(ran)!r}, 'w')"})
        got = hashlib.sha256(archive.read_bytes()).hexdigest()
        with pytest.raises(InstallError, match=f"must have SHA-256 {installer.SHA256}; got {got}") as error:
            installer.download_archive(tmp_path / "download")
        assert "\n" not in str(error.value)
        assert not ran.exists()
        assert not list((tmp_path / "download").glob("*.tar.gz"))

    def test_setup_py_does_not_run_even_when_the_hash_is_right(self, own_index, tmp_path, monkeypatch):
        ran = tmp_path / "ran"
        archive = write_archive(own_index, {"setup.py": f"open({str(ran)!r}, 'w')"})
        monkeypatch.setattr(installer, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
        downloaded = installer.download_archive(tmp_path / "download")
        assert downloaded.read_bytes() == archive.read_bytes()
        assert not ran.exists()

    def test_unreachable_index_is_one_line(self, own_index, tmp_path, monkeypatch):
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("PIP_RETRIES", "1")
        with pytest.raises(InstallError, match="index must be reachable; got .*Connection refused") as error:
            installer.download_archive(tmp_path / "download")
        assert "\n" not in str(error.value)

    def test_archive_that_the_index_lacks_is_one_line(self, own_index, tmp_path):
        with pytest.raises(InstallError, match="pip failed: No matching distribution found for pb1-detectron2==0.6"):
            installer.download_archive(tmp_path / "download")


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("/bin/python: No module named pip", "pip must be installed for python3; it is not"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("", "pip failed: no message"),
    ],
)
def test_explain_pip(log, message):
    assert message in installer.explain_pip(log, "python3")


class TestRepackage:
    def test_sources_are_where_the_original_set_up_puts_them(self, tmp_path):
        files = ["detectron2/a.py", "projects/PointRend/point_rend/b.py", "projects/PointRend/train.py", "setup.py"]
        files += ["detectron2/model_zoo/configs/Base.yaml", "LICENSE"]
        sources = installer.read_sources(write_archive(tmp_path, {name: name for name in files}))
        assert sources == {
            "LICENSE": b"LICENSE",
            "detectron2/a.py": b"detectron2/a.py",
            "detectron2/model_zoo/configs/Base.yaml": b"detectron2/model_zoo/configs/Base.yaml",
            "detectron2/projects/point_rend/b.py": b"projects/PointRend/point_rend/b.py",
        }

    def test_every_patch_replaces_every_occurrence(self):
        sources = make_sources()
        installer.apply_patches(sources)
        for file, _, new in PATCHES:
            assert sources[f"detectron2/{file}"].decode().count(new) >= 2, (file, new)

    @pytest.mark.parametrize("index", [0, len(PATCHES) - 1])
    def test_patch_without_its_text_is_refused(self, index):
        file, old, new = PATCHES[index]
        with pytest.raises(InstallError, match=f"detectron2/{file} must contain") as error:
            installer.apply_patches({f"detectron2/{file}": b"something else\n"}, ((file, old, new),))
        assert repr(old.strip()) in str(error.value)

    def test_wheel_installs_as_detectron2(self, own_index, tmp_path):
        sources = make_sources()
        installer.apply_patches(sources)
        wheel = installer.write_wheel(sources, tmp_path)
        target = tmp_path / "site"
        installer.run_pip("install", "--no-deps", "--no-compile", "--target", str(target), str(wheel))
        (dist,) = importlib.metadata.distributions(path=[str(target)])
        assert (dist.metadata["Name"], dist.version) == ("detectron2", "0.6")
        assert "data/build.py" in dist.metadata.get_payload()
        assert (target / "detectron2" / "__init__.py").read_bytes() == sources["detectron2/__init__.py"]
        for file in (file for file in dist.files if file.hash and "detectron2" in file.parts[0]):
            digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
            assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value


class TestInstalled:
    def test_importable_detectron2_is_left_alone(self):
        if not SITE.exists() or installer.is_outdated_build():
            pytest.skip("no detectron2 that is up to date")
        script = [sys.executable, str(tiny.ROOT / "tools" / "install_detectron2.py")]
        process = subprocess.run(script, capture_output=True, text=True, timeout=60)
        assert process.returncode == 0, process.stderr
        assert f"({SITE / '__init__.py'}); it is left alone" in process.stdout

    @pytest.mark.parametrize(
        ("generator", "outdated"),
        [
            (f"{installer.GENERATOR} (0123456789abcdef)", True),
            (f"{installer.GENERATOR} ({installer.patch_digest()})", False),
            ("setuptools 80", False),
        ],
    )
    def test_only_our_own_older_build_is_replaced(self, generator, outdated, tmp_path, monkeypatch):
        dist_info = tmp_path / installer.DIST_INFO
        dist_info.mkdir()
        (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\n")
        (dist_info / "WHEEL").write_text(f"Wheel-Version: 1.0\nGenerator: {generator}\n")
        monkeypatch.syspath_prepend(tmp_path)
        assert installer.is_outdated_build() is outdated


@needs_our_build
class TestRepairs:
    @pytest.mark.parametrize("file", sorted({file for file, _, _ in PATCHES}))
    def test_installed_file_is_patched(self, file):
        text = (SITE / file).read_text()
        for _, old, new in (patch for patch in PATCHES if patch[0] == file):
            assert new in text
            assert old not in text.replace(new, "")

    def test_model_zoo_finds_its_configs(self):
        from detectron2 import model_zoo

        assert Path(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")).is_file()
        assert model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model.num_classes == 80
        with pytest.raises(RuntimeError, match="not available in Model Zoo"):
            model_zoo.get_config_file("no/such.yaml")

    def test_tracing_can_be_imported_without_caffe2(self):
        script = "from detectron2.export import TracingAdapter, scripting_with_instances"
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert process.returncode == 0, process.stderr

    def test_operators_of_the_extension_fail_where_they_are_called(self):
        import torch
        from detectron2.layers import DeformConv, ROIAlignRotated
        from detectron2.layers.rotated_boxes import pairwise_iou_rotated

        DeformConv(3, 3, 3)
        with pytest.raises(ImportError, match=r"without its C\+\+ extension, which has box_iou_rotated"):
            pairwise_iou_rotated(torch.zeros(1, 5), torch.zeros(1, 5))
        with pytest.raises(ImportError, match="roi_align_rotated_forward"):
            ROIAlignRotated((2, 2), 1.0, 1)(torch.zeros(1, 3, 8, 8), torch.zeros(1, 6))

    def test_coco_evaluation_falls_back_to_pycocotools(self, tmp_path):
        from detectron2.data import DatasetCatalog, MetadataCatalog
        from detectron2.evaluation import COCOEvaluator, coco_evaluation

        assert coco_evaluation.COCOeval_opt is coco_evaluation.COCOeval
        (tmp_path / "empty.json").write_text('{"images": [], "annotations": [], "categories": []}')
        name = "install_detectron2_empty"
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).json_file = str(tmp_path / "empty.json")
        try:
            evaluator = COCOEvaluator(name, tasks=("bbox",), distributed=False, use_fast_impl=True)
            assert evaluator._use_fast_impl is False
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)

    def test_types_of_numpy(self):
        from detectron2.data.build import print_instances_class_histogram
        from detectron2.structures import PolygonMasks
        from detectron2.structures.masks import polygons_to_bitmask

        square = np.array([1.0, 1, 3, 1, 3, 3, 1, 3])
        assert polygons_to_bitmask([square], 4, 4).dtype == np.bool_
        assert polygons_to_bitmask([], 4, 4).sum() == 0
        assert PolygonMasks([[square], []]).nonempty().tolist() == [True, False]
        print_instances_class_histogram([{"annotations": [{"category_id": 1}]}], ["a", "b"])

    def test_extent_transform_has_a_default_interpolation(self):
        from detectron2.data.transforms import ExtentTransform

        image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        assert ExtentTransform((0, 0, 4, 4), (4, 4)).apply_image(image).tolist() == image.tolist()

    def test_anchors_without_a_warning(self):
        import torch
        from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

        generator = DefaultAnchorGenerator(sizes=[[8]], aspect_ratios=[[1.0]], strides=[4], offset=0.0)
        (anchors,) = generator([torch.zeros(1, 1, 2, 3)])
        assert anchors.get_centers().tolist() == [[0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4]]

    def test_objects_of_workers_are_gathered_without_a_warning(self, tmp_path):
        import torch.distributed as dist
        from detectron2.utils import comm

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        try:
            tensor = comm._serialize_to_tensor({"a": [1, 2]}, dist.group.WORLD)
            assert pickle.loads(tensor.numpy().tobytes()) == {"a": [1, 2]}
        finally:
            dist.destroy_process_group()

    def test_semantic_segmentation_evaluation(self, tmp_path):
        import torch
        from detectron2.data import DatasetCatalog, MetadataCatalog
        from detectron2.evaluation import SemSegEvaluator
        from PIL import Image

        Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "truth.png")
        name = "install_detectron2_semantic"
        records = [{"file_name": "image.png", "sem_seg_file_name": str(tmp_path / "truth.png")}]
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(stuff_classes=["off", "diagonal"], ignore_label=255)
        try:
            evaluator = SemSegEvaluator(name, distributed=False)
            evaluator.reset()
            scores = torch.stack([1 - torch.eye(4), torch.eye(4)])
            evaluator.process([{"file_name": "image.png"}], [{"sem_seg": scores}])
            assert evaluator.evaluate()["sem_seg"]["mIoU"] == 100
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
