"""Records pixels of imagecorruptions in library.json for `test_corrupt`: 16 of each corruption and severity.

Run it in an environment of its own: numpy, scipy, scikit-image, numba, opencv-python-headless and, with --no-deps,
imagecorruptions-imaug (1.1.5 with NumPy 2.4.6 is what was recorded). That package draws from NumPy's global generator;
here its calls go to a generator that begins as ours does.

    PYTHONPATH=. python tests/data/corruptions/record_library.py
"""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("library.json")
SEED = 7
ROWS, COLUMNS = (3, 15, 27, 39), (2, 17, 34, 51)  # of the pixels that are recorded


def make_picture():
    """40 x 56 pixels: blocks of colours under some noise."""
    rng = np.random.default_rng(5)
    blocks = np.kron(rng.integers(30, 220, (5, 7, 3)), np.ones((8, 8, 1), dtype=int))
    return np.clip(blocks + rng.integers(-20, 21, blocks.shape), 0, 255).astype(np.uint8)


def take_pixels(picture):
    return picture[np.ix_(ROWS, COLUMNS)].reshape(-1, 3).tolist()


def record():
    import imagecorruptions
    from imagecorruptions import corruptions

    def shuffle(height, width, pixels, strength, seed):
        return plain(height, width, pixels, strength, None)

    plain = corruptions._shuffle_pixels_njit_glass_blur.py_func  # numba's has a generator of its own
    corruptions._shuffle_pixels_njit_glass_blur = shuffle
    np.random.seed = lambda seed: None

    pixels = {}
    for name in imagecorruptions.get_corruption_names():
        for severity in range(1, 6):
            generator = np.random.default_rng(SEED)
            for function in ("normal", "poisson", "uniform"):
                setattr(np.random, function, getattr(generator, function))
            np.random.randint = generator.integers

            options = {"seed": generator} if name == "impulse_noise" else {}
            corrupted = imagecorruptions.corrupt(make_picture(), severity, name, **options)
            pixels[f"{name} {severity}"] = take_pixels(corrupted)
    return pixels


if __name__ == "__main__":
    lines = [f"{json.dumps(key)}: {json.dumps(pixels)}" for key, pixels in record().items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
