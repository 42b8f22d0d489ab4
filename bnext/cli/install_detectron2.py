"""Install detectron2 0.6 as a pure-Python package into the environment of the running interpreter.

Detectron2 is not on the package index under its own name. A source archive of version 0.6 is, and
its Python files are those of the upstream tag; its C++ sources are missing, and some of its code
predates current NumPy, Pillow, setuptools and torch. This script fetches the archive through pip
(so the index, proxy and certificates that pip is configured with apply), checks its SHA-256,
applies the fixes of `PATCHES`, and installs the result as a distribution called `detectron2`.

Nothing of the archive is executed before its hash is known, and its setup.py never is. A detectron2
that is importable already, from whatever source, is left alone. Standard library and pip only: a
set-up runs this file before there is anything else.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """Install detectron2 0.6 as pure Python, without a compiler, into the environment of this Python.

    bnext install-detectron2
    bnext install-detectron2 --no-deps    # leave the packages that it needs to you

The source archive comes from the package index and is checked by its SHA-256; its setup.py is never run. What is
mended in it for current libraries is listed in the package's metadata. A detectron2 that can be imported is left
alone."""
NAME, VERSION = "pb1-detectron2", "0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
GENERATOR = "bnext-install-detectron2"

# Where the original setup.py puts the parts that do not lie in the package's own folder.
PROJECTS = {
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}
# black (only for LazyConfig.to_py), pydot and future (only for the Caffe2 export) are left out.
REQUIRES: tuple[str, ...] = (
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
)
REQUIRES += ("tqdm>4.29.0", "cloudpickle", "tensorboard", "fvcore>=0.1.5", "iopath>=0.1.7", "omegaconf>=2.1")
REQUIRES += ("hydra-core>=1.1",)

_OPTIONAL_C = """\
try:
    from detectron2 import _C
except ImportError:  # built without the C++ extension: fail where an operator is called

    class _C:
        def __getattr__(self, name):
            raise ImportError(f"detectron2 was built without its C++ extension, which has {name}")

    _C = _C()
"""
_IMPORT_C = "from detectron2 import _C\n"

# (file, old text, new text): every old text must be there; all its occurrences are replaced.
PATCHES: tuple[tuple[str, str, str], ...] = (
    ("layers/rotated_boxes.py", _IMPORT_C, _OPTIONAL_C),
    ("layers/deform_conv.py", _IMPORT_C, _OPTIONAL_C),
    ("layers/roi_align_rotated.py", _IMPORT_C, _OPTIONAL_C),
    (
        "evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "try:\n"
        "    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:  # built without the C++ extension: pycocotools does the evaluation\n"
        "    COCOeval_opt = COCOeval\n",
    ),
    (
        "evaluation/coco_evaluation.py",
        "self._use_fast_impl = use_fast_impl",
        "self._use_fast_impl = use_fast_impl and COCOeval_opt is not COCOeval",
    ),
    # Pillow 10 removed LINEAR.
    ("data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),
    # NumPy 1.24 removed the aliases of the builtin types.
    ("data/build.py", "dtype=np.int\n", "dtype=int\n"),
    ("data/build.py", "dtype=np.int)", "dtype=int)"),
    ("data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)"),
    ("evaluation/pascal_voc_evaluation.py", "astype(np.bool)", "astype(bool)"),
    ("evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)"),
    ("evaluation/sem_seg_evaluation.py", "dtype=np.float)", "dtype=float)"),
    ("evaluation/sem_seg_evaluation.py", "astype(np.float)", "astype(float)"),
    ("structures/masks.py", "astype(np.bool)", "astype(bool)"),
    ("structures/masks.py", "dtype=np.bool)", "dtype=bool)"),
    ("utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)"),
    ("utils/visualizer.py", "astype(np.bool)", "astype(bool)"),
    # setuptools 82 removed pkg_resources.
    ("model_zoo/model_zoo.py", "import pkg_resources\n", "import importlib.resources\n"),
    (
        "model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'os.path.join(\n        str(importlib.resources.files("detectron2.model_zoo")), "configs", config_path\n    )',
    ),
    # Caffe2 and its proto files are gone: what needs them is left out, and tracing can be imported.
    (
        "export/__init__.py",
        "from .api import *\n",
        "try:\n"
        "    from .api import *\n"
        "except ModuleNotFoundError as error:  # of Caffe2, whose exporters are then not to be had\n"
        '    if (error.name or "").partition(".")[0] != "caffe2":\n'
        "        raise\n",
    ),
    # Python deprecates Logger.warn.
    ("data/datasets/coco.py", "logger.warn(", "logger.warning("),
    ("engine/defaults.py", "logger.warn(", "logger.warning("),
    ("evaluation/coco_evaluation.py", "logger.warn(", "logger.warning("),
    ("evaluation/lvis_evaluation.py", "logger.warn(", "logger.warning("),
    ("evaluation/sem_seg_evaluation.py", "logger.warn(", "logger.warning("),
    # torch warns when meshgrid is not told its indexing.
    ("modeling/anchor_generator.py", "meshgrid(shifts_y, shifts_x)", 'meshgrid(shifts_y, shifts_x, indexing="ij")'),
    # torch deprecates typed storages, and moved automatic mixed precision out of torch.cuda.
    ("utils/comm.py", "torch.ByteStorage.from_buffer(buffer)", "bytearray(buffer)"),
    ("utils/comm.py", "torch.ByteTensor(storage)", "torch.frombuffer(storage, dtype=torch.uint8)"),
    ("engine/train_loop.py", "from torch.cuda.amp import GradScaler", "from torch.amp import GradScaler"),
    ("engine/train_loop.py", "grad_scaler = GradScaler()", 'grad_scaler = GradScaler("cuda")'),
    ("engine/train_loop.py", "from torch.cuda.amp import autocast", "from torch.amp import autocast"),
    ("engine/train_loop.py", "with autocast():", 'with autocast("cuda"):'),
)

# pip asks a source archive for its metadata before it saves it, which would run the archive's
# setup.py. This stands in for setuptools and answers in its place.
_METADATA_ONLY_BACKEND = f"""
import pathlib

class _Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, directory, config_settings=None):
        folder = pathlib.Path(directory, "pb1_detectron2-{VERSION}.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {NAME}\\nVersion: {VERSION}\\n")
        return folder.name

__legacy__ = _Backend()
"""


class InstallError(Exception):
    """Detectron2 cannot be installed; the message is one line and says what to do."""


def run_pip(*arguments: str, python: Path | str = sys.executable, path: Path | None = None, show: bool = False) -> None:
    """Run the pip of an interpreter; on failure raise its reason in one line.

    Args:
        arguments: what follows `pip`.
        python: the interpreter.
        path: a folder put before everything else that the interpreter imports.
        show: let pip's output and progress bars through.
    """
    env = dict(os.environ)
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), env.get("PYTHONPATH", ""))))
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    output = None if show else subprocess.PIPE
    # close_fds: pip keeps the lock of the set-up (see setup_environment.py) should its parent be killed.
    process = subprocess.run(command, env=env, stdout=output, stderr=subprocess.PIPE, text=True, close_fds=False)
    if process.returncode:
        raise InstallError(explain_pip((process.stdout or "") + process.stderr, python))


def explain_pip(log: str, python: Path | str) -> str:
    """The reason of a failed pip run in one line with the remedy."""
    if "No module named pip" in log:
        return f"pip must be installed for {python}; it is not. Run `{python} -m ensurepip`."
    if "DO NOT MATCH THE HASHES" in log:
        got = re.search(r"Got\s+([0-9a-f]{64})", log)
        return _wrong_hash(got.group(1) if got else "another one")
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    reason = (errors or log.strip().splitlines() or ["no message"])[-1].rstrip(".")
    if "No space left" in log:
        return "The disk is full (pip: No space left on device). Free some space, also where TMPDIR points."
    if "Retrying (" in log:
        cause = re.search(r"\[Errno -?\d+\] [\w ]+", log)
        seen = cause[0] if cause else reason
        return f"The package index must be reachable; got {seen}. Check the network, pip's index and the proxy."
    return f"pip failed: {reason}. Check pip's index and its configuration, then try again."


def _wrong_hash(got: str) -> str:
    return (
        f"The archive of {NAME} {VERSION} must have SHA-256 {SHA256}; got {got}. "
        "Nothing was installed. Check pip's index and cache for a changed file."
    )


def download_archive(folder: Path) -> Path:
    """Fetch the archive with pip into `folder`; its hash is checked by pip, and once more here."""
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(_METADATA_ONLY_BACKEND)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n")
    options = ("--no-deps", "--no-binary", NAME, "--no-build-isolation", "--use-pep517", "--require-hashes")
    run_pip("download", *options, "-r", str(requirements), "-d", str(folder), path=backend.parent)
    (archive,) = folder.glob("*.tar.gz")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise InstallError(_wrong_hash(digest))
    return archive


def read_sources(archive: Path) -> dict[str, bytes]:
    """The files of the package by their path in it ("detectron2/..."), projects and configs included."""
    sources: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            path = member.name.split("/", 1)[1]
            for old, new in PROJECTS.items():
                path = path.replace(old + "/", new + "/")
            if path.startswith("detectron2/") or path == "LICENSE":
                stream = tar.extractfile(member)
                sources[path] = stream.read() if stream else b""
    return sources


def apply_patches(sources: dict[str, bytes], patches: tuple[tuple[str, str, str], ...] = PATCHES) -> None:
    """Replace each old text by the new one, in place.

    Raises:
        InstallError: a file or a text is not there, so that the patch would do nothing.
    """
    for file, old, new in patches:
        path = f"detectron2/{file}"
        text = sources.get(path, b"").decode()
        if old not in text:
            raise InstallError(f"{path} must contain {old.strip()!r} to be patched; it does not. Nothing is installed.")
        sources[path] = text.replace(old, new).encode()


def patch_digest() -> str:
    """Identifies the content of our build: the archive and the patches."""
    return hashlib.sha256(repr((SHA256, PATCHES, REQUIRES)).encode()).hexdigest()[:16]


def write_wheel(sources: dict[str, bytes], folder: Path) -> Path:
    """Write the sources as a pure-Python wheel of `detectron2`."""
    changed = ", ".join(sorted({file for file, _, _ in PATCHES}))
    metadata = ["Metadata-Version: 2.1", "Name: detectron2", f"Version: {VERSION}", "License: Apache-2.0"]
    metadata += ["Summary: Detectron2 without its C++ extension, for current libraries", "Requires-Python: >=3.10"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in REQUIRES]
    metadata += ["", f"Repackaged from {NAME} {VERSION}; changed files: {changed}", ""]

    generator = f"Generator: {GENERATOR} ({patch_digest()})"
    wheel_tags = ["Wheel-Version: 1.0", generator, "Root-Is-Purelib: true", "Tag: py3-none-any", ""]

    files = {path: data for path, data in sources.items() if path != "LICENSE"}
    files[f"{DIST_INFO}/LICENSE"] = sources["LICENSE"]
    files[f"{DIST_INFO}/METADATA"] = "\n".join(metadata).encode()
    files[f"{DIST_INFO}/WHEEL"] = "\n".join(wheel_tags).encode()
    files[f"{DIST_INFO}/RECORD"] = _record(files).encode()

    wheel = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return wheel


def _record(files: dict[str, bytes]) -> str:
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.writerow((path, f"sha256={digest}", len(data)))
    rows.writerow((f"{DIST_INFO}/RECORD", "", ""))
    return stream.getvalue()


def find_installed() -> str | None:
    """The place of a detectron2 that can be imported, or None; a bare folder of that name does not count."""
    spec = importlib.util.find_spec("detectron2")
    return spec.origin if spec is not None else None


def is_outdated_build() -> bool:
    """Whether the installed detectron2 is one of ours, made with other patches than today's."""
    try:
        wheel_tags = importlib.metadata.distribution("detectron2").read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        return False
    return GENERATOR in wheel_tags and patch_digest() not in wheel_tags


def find_missing_requirements() -> list[str]:
    """The names of `REQUIRES` of which no version is installed."""
    missing = []
    for requirement in REQUIRES:
        try:
            importlib.metadata.distribution(re.split("[<>=]", requirement)[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement)
    return missing


def install(*, with_requirements: bool = True) -> None:
    """Install detectron2 where there is none, and the packages that it needs.

    Raises:
        InstallError: what is wrong; detectron2 is then not installed, or only packages that it needs are missing.
    """
    installed = find_installed()
    if installed and not is_outdated_build():
        print(f"detectron2 is installed already ({installed}); it is left alone.")
    else:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            sources = read_sources(download_archive(folder))
            apply_patches(sources)
            wheel = write_wheel(sources, folder)
            run_pip("install", "--no-deps", "--no-index", "--force-reinstall", str(wheel))
        print(f"detectron2 {VERSION} is installed ({len(PATCHES)} fixes applied).")

    missing = find_missing_requirements() if with_requirements else []
    if missing:
        print(f"Installing what it needs: {', '.join(missing)}.", flush=True)
        run_pip("install", *missing)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; the exit status is 0, 1 where it fails, 2 for wrong options, or 130 after Ctrl-C."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, formatter_class=form)
    parser.add_argument("--no-deps", action="store_true", help="do not install the packages that detectron2 needs")
    args = parser.parse_args(argv)

    try:
        install(with_requirements=not args.no_deps)
    except (InstallError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run it again.", file=sys.stderr)
        return 130
    return 0
