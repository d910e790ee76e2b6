"""Makes crops.npz: what the two crops must give, by a second implementation in float64.

    python tests/golden/make_crops.py

Resampling here is a sum over all source pixels with weights taken from the definition of the
filter, normalised to one; nothing of Pillow or TensorFlow is called. Sources are cuts of the two
photographs that scikit-learn ships (china.jpg by danielbuechele, flower.jpg by vultilion, both on
Flickr under CC BY 2.0), stored beside the result, so that no decoder plays a part.
"""

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def box(x):
    """1 on (-1/2, 1/2]."""
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def triangle(x):
    """1 - |x| on (-1, 1)."""
    return np.maximum(1 - np.abs(x), 0)


def cubic(x, a=-0.5):
    """Keys' cubic on (-2, 2)."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def weights(source, target, kernel):
    """[target, source]: pixel centres at k + 1/2, the filter stretched when the image shrinks.

    In whole numbers until the division, so that a pixel on the edge of the box filter is on it.
    """
    ours, theirs = 2 * np.arange(target)[:, None] + 1, 2 * np.arange(source) + 1
    found = kernel((theirs * target - ours * source) / (2 * max(source, target)))
    return found / found.sum(axis=1, keepdims=True)


def quantise(image):
    return np.clip(np.floor(image + 0.5), 0, 255)


def resample(image, height, width, kernel, between):
    """Columns first, then rows; `between` is applied after each pass."""
    image = between(np.einsum("xw,hwc->hxc", weights(image.shape[1], width, kernel), image))
    return between(np.einsum("yh,hxc->yxc", weights(image.shape[0], height, kernel), image))


def middle(image, size):
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def adm(image, size):
    image = image.astype(float)
    while min(image.shape[:2]) >= 2 * size:
        image = resample(image, image.shape[0] // 2, image.shape[1] // 2, box, quantise)
    scale = size / min(image.shape[:2])
    height, width = (round(side * scale) for side in image.shape[:2])
    return middle(resample(image, height, width, cubic, quantise), size)


def authors(image, size):
    """Not rounded; TensorFlow 2.21's tf.image.resize(antialias=True) is within 2e-4 of it."""
    square = middle(image.astype(float), min(image.shape[:2]))
    return resample(square, size, size, triangle, lambda image: image)


# Top, left, height, width of a cut, and the size of the crop: halved twice, once with an odd side,
# not at all, enlarged, the size asked for, upright and square. Odd sides that are halved are 3 mod
# 4: at 1 mod 4 a pixel lies on the edge of the box filter, and rounding decides where it counts.
CASES = {
    "china_halved_twice": ("china", 120, 200, 103, 119, 24),
    "china_halved_once": ("china", 200, 40, 97, 120, 32),
    "flower_plain": ("flower", 100, 250, 60, 90, 40),
    "flower_enlarged": ("flower", 150, 300, 20, 27, 32),
    "flower_same_size": ("flower", 60, 100, 32, 45, 32),
    "china_upright": ("china", 100, 300, 110, 71, 24),
    "flower_square": ("flower", 180, 330, 64, 64, 32),
}


def main():
    from sklearn.datasets import load_sample_image

    arrays = {}
    for name, (photograph, top, left, height, width, size) in CASES.items():
        cut = load_sample_image(f"{photograph}.jpg")[top : top + height, left : left + width]
        arrays[f"{name}/source"] = cut
        arrays[f"{name}/adm"] = adm(cut, size).astype(np.uint8)
        arrays[f"{name}/authors"] = authors(cut, size).astype(np.float32)
    np.savez_compressed(HERE / "crops.npz", **arrays)


if __name__ == "__main__":
    main()
