"""Resizing images as other people's code does it: one matrix per axis.

Rules differ in where the samples of the output lie in the input, and in what they weigh there:

    corner       bilinear, row i of the output at row i * scale of the input (TensorFlow 1 without
                 align_corners)
    half_pixel   bilinear, the centres of pixels are at i + 1/2 (PyTorch)
    pil_bicubic  bicubic of Pillow, antialiased: where the image shrinks, the kernel is as much
                 wider. Weights sum to 1, also where the border cuts the kernel. PyTorch's
                 interpolation with antialias=True has the same weights.

clean-fid (https://github.com/GaParmar/clean-fid, cleanfid/resize.py and inception_torchscript.py)
does this in its mode `clean`: each channel of a uint8 RGB image becomes a Pillow image of mode "F"
(float32), which Pillow resizes by `pil_bicubic` to 299x299, columns first, then rows, with nothing
rounded or clipped in between; the result is clipped to [0, 255], as the kernel overshoots, not
rounded, and goes into the network as (v - 128) / 128, without the network's own resizing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Beyond the border of an image there is nothing (Pillow), or its last pixel again (PyTorch).
_PIL_A, _TORCH_A = -0.5, -0.75  # the free parameter of their cubic kernels


def interpolation_matrix(size: int, out_size: int, rule: str) -> np.ndarray:
    """Interpolation along one axis: float32 [out_size, size], whose rows sum to 1.

    Args:
        size: of the image along this axis.
        out_size: of the resized image.
        rule: key of `RULES`.
    """
    return RULES[rule](size, out_size)


def resize(images: jax.Array, out_size: int, rule: str) -> jax.Array:
    """[n, H, W, C] of any type -> float32 [n, out_size, out_size, C], neither rounded nor clipped.

    Products have the highest precision: pixels keep their 24 bits on every back end.
    """
    rows, columns = (interpolation_matrix(size, out_size, rule) for size in images.shape[1:3])
    x, highest = images.astype(jnp.float32), jax.lax.Precision.HIGHEST
    x = jnp.einsum("qw,nhwc->nhqc", columns, x, precision=highest)
    return jnp.einsum("ph,nhqc->npqc", rows, x, precision=highest)


# ---------------------------------------------------------------------- the rules


def _bilinear(size: int, out_size: int, half_pixel: bool) -> np.ndarray:
    """Not antialiased; places in float32, as those whose numbers this must give compute them."""
    scale = np.float32(size) / np.float32(out_size)
    place = np.arange(out_size, dtype=np.float32)
    if half_pixel:
        half = np.float32(0.5)
        place = np.maximum((place + half) * scale - half, np.float32(0))
    else:
        place = place * scale
    low = np.minimum(place.astype(np.int64), size - 1)
    high = np.minimum(low + 1, size - 1)
    fraction = place - low.astype(np.float32)
    matrix = np.zeros((out_size, size), np.float32)
    rows = np.arange(out_size)
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, high), fraction)
    return matrix


def _pil_bicubic(size: int, out_size: int) -> np.ndarray:
    """`precompute_coeffs` of Pillow, in float64 as there.

    https://github.com/python-pillow/Pillow/blob/main/src/libImaging/Resample.c
    """
    scale = size / out_size
    stretch = max(scale, 1.0)  # of the kernel
    centre = (np.arange(out_size)[:, None] + 0.5) * scale
    # Bounds of the window; truncated, as a conversion to int in C does.
    first = np.maximum(np.trunc(centre - 2 * stretch + 0.5), 0)
    end = np.minimum(np.trunc(centre + 2 * stretch + 0.5), size)
    pixel = np.arange(size)
    weights = _cubic((pixel + 0.5 - centre) / stretch, _PIL_A)
    weights = np.where((first <= pixel) & (pixel < end), weights, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def torch_bicubic(size: int, out_size: int, scale: float) -> np.ndarray:
    """PyTorch's bicubic interpolation without antialiasing: float64 [out_size, size].

    Args:
        size: of the input along this axis.
        out_size: of the output.
        scale: input samples per output sample; PyTorch lets it differ from size / out_size.
    """
    place = (np.arange(out_size) + 0.5) * scale - 0.5
    low = np.floor(place).astype(np.int64)
    matrix = np.zeros((out_size, size))
    for tap in range(-1, 3):
        pixel = np.clip(low + tap, 0, size - 1)
        np.add.at(matrix, (np.arange(out_size), pixel), _cubic(place - low - tap, _TORCH_A))
    return matrix


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' convolution kernel, whose support is [-2, 2]."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


RULES: dict[str, Callable[[int, int], np.ndarray]] = {
    "corner": lambda size, out_size: _bilinear(size, out_size, half_pixel=False),
    "half_pixel": lambda size, out_size: _bilinear(size, out_size, half_pixel=True),
    "pil_bicubic": _pil_bicubic,
}
