"""Names and severities of corruptions, and what they need; nothing here reads or changes a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bnext.errors import ConfigError, LaunchError, Refusal
from bnext.text import suggest

__all__ = ["COMMON", "ENLARGE", "NAMES", "SEVERITIES", "check_corruption", "find_frost", "find_smallest"]

# As imagecorruptions calls them, in its order: noise, blur, weather, digital.
COMMON = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
NAMES = (*COMMON, "invert", "low_contrast")
SEVERITIES = (1, 2, 3, 4, 5)
ENLARGE = (
    "Enlarge the pictures of the set, with their boxes, or remove the small ones; invert and low_contrast take all."
)

_FROST = "imagecorruptions-imaug"
_UNKNOWN = Refusal(ConfigError, "A corruption", f"be one of {', '.join(NAMES)}", "{remedy}")
_NO_SEVERITY = Refusal(
    ConfigError, "The severity of a corruption", "be 1, 2, 3, 4 or 5", "Give one of them: 5 is the worst."
)
_NO_SCIPY = Refusal(LaunchError, "SciPy", "be installed for corruptions", "Run `pip install scipy`.")
_NO_FROST = Refusal(
    LaunchError,
    "The pictures of frost",
    f"be there: they come with {_FROST}, of which nothing else is used",
    f"Run `pip install --no-deps {_FROST}` (its dependency opencv-python would break opencv-python-headless), or "
    "leave frost out.",
)


def check_corruption(name: object, severity: object, where: str = "") -> None:
    """Refuse a corruption that there is none of, or that needs what is not installed.

    Args:
        name: should be one of `NAMES`.
        severity: should be one of `SEVERITIES`.
        where: the entry or option that names it.

    Raises:
        ConfigError: the name or the severity is none.
        LaunchError: SciPy, or the pictures of frost, are not installed.
    """
    if name not in NAMES:
        raise _UNKNOWN.of(repr(name), where, remedy=suggest(name, NAMES))
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise _NO_SEVERITY.of(repr(severity), where or str(name))

    if importlib.util.find_spec("scipy") is None:
        raise _NO_SCIPY.of("none", where)
    if name == "frost":
        find_frost()


def find_smallest(name: str) -> int:
    """The pixels that each side of a picture needs for a corruption: those of imagecorruptions, for its fifteen."""
    return 32 if name in COMMON else 1


def find_frost() -> list[Path]:
    """The six pictures of frost of ImageNet-C, in its order.

    Raises:
        LaunchError: they are not installed.
    """
    package = importlib.util.find_spec("imagecorruptions")  # which is not imported
    folders = package.submodule_search_locations if package is not None else None
    files: list[Path] = []
    for folder in folders or ():
        files += Path(folder, "frost").glob("frost[1-6].*")
    if len(files) != 6:
        raise _NO_FROST.of(f"{len(files)} of 6")
    return sorted(files)
