"""Encoded image to square uint8 RGB: decoding, and the two crops of the field.

What both crops see is what Pillow decodes, made RGB by `to_rgb`. An orientation that a camera noted
in EXIF is not applied: neither ADM nor TFDS does, and statistics were made without it.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

Crop = Callable[[Image.Image, int], np.ndarray]


def adm(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop of ADM, DiT and most that followed, pixel for pixel.

    Halves the image (box filter, sides rounded down) while its short side is at least 2 * size,
    then resizes the short side to `size` (bicubic), then cuts the middle.
    Source: https://github.com/openai/guided-diffusion/blob/main/guided_diffusion/image_datasets.py

    Args:
      image: of mode RGB.
      size: side of the result, pixels.

    Returns:
      uint8 [size, size, 3].
    """
    while min(image.size) >= 2 * size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def authors(image: Image.Image, size: int) -> np.ndarray:
    """The crop of the shortcut authors' code: the middle square, resized by a triangle filter.

    Their code calls `tf.image.resize(..., antialias=True)` and trains on its float32 result. Here
    the same filter is applied in float32 (the sums may differ in the last bits) and the result is
    rounded to whole grey levels, so a pixel is at most 0.5 levels of 255 from theirs. That keeps
    data sets uint8, as what they are compared with is.
    Source: https://github.com/kvfrans/shortcut-models/blob/main/utils/datasets.py

    Args:
      image: of mode RGB.
      size: side of the result, pixels.

    Returns:
      uint8 [size, size, 3].
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    found = np.empty((size, size, 3), np.uint8)
    for band in range(3):
        # Pillow rounds RGB to whole levels between the two passes of the filter; mode F does not.
        levels = square.getchannel(band).convert("F")
        resized = np.asarray(levels.resize((size, size), Image.Resampling.BILINEAR))
        # Weights of a triangle are not negative and add up to 1, so nothing leaves 0..255.
        found[..., band] = np.rint(resized)
    return found


CROPS: dict[str, Crop] = {"adm": adm, "authors": authors}


def to_rgb(image: Image.Image) -> Image.Image:
    """Makes any decoded image RGB with 8 bits.

    Grey becomes three equal bands, a palette its colours, CMYK (as in some JPEGs) the plain
    complement, and transparency is dropped: all as Pillow's `convert` does, and so ADM's code.
    Grey with 16 bits is divided by 257, where `convert` would clip it at 255.

    Raises:
      ValueError: there is no range of values to map to 0..255 (float images and the like).
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # I;16 and its byte orders; I is what some 16-bit files become
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() >= 2**16:
            raise ValueError(f"mode {image.mode} with values {levels.min()}..{levels.max()}")
        image = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    if image.mode in ("F", "LAB", "HSV"):
        raise ValueError(f"mode {image.mode}, of which it is not known how to show it as RGB")
    return image.convert("RGB")


def decode(data: bytes) -> Image.Image:
    """Decodes an image file whole; of several frames the first.

    Returns:
      Image of mode RGB.

    Raises:
      ValueError: it cannot be decoded, and why.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image)
    except MemoryError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is no image of a known format") from error
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
