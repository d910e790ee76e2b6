"""Pictures of a run: samples by number of steps, and distance against number of steps."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shortcut_jax.files import write_atomically

LABEL_HEIGHT = 16  # pixels above the samples for the step counts
GAP = 2  # pixels between samples
_BACKGROUND = 255


def sample_grid(
    samples: Mapping[int, np.ndarray],
    path: str | os.PathLike[str],
    scale: int | None = None,
    rows: int = 8,
    names: Sequence[str] = (),
) -> np.ndarray:
    """Writes a PNG with one column per step count, in which a row shows the same noise.

    A column with fewer than `rows` samples ends early; the picture is as high as the longest.

    Args:
      samples: step count -> uint8 `[n, height, width, channels]`, grey (1 channel) or RGB (3);
        everything but n the same for all.
      path: of the PNG.
      scale: integer factor of the enlargement (nearest neighbour). By default the smallest that
        makes a sample 64 pixels wide and high.
      rows: the most rows to draw.
      names: of the rows, written to their left; all or none.

    Returns:
      The picture, uint8 `[height, width, 3]`.

    Raises:
      ValueError: if there are no samples, or they are of another type or shape.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = _common_size(samples)
    scale = scale or max(1, math.ceil(64 / min(height, width)))
    rows = min(rows, max(len(images) for images in samples.values()))
    columns = sorted(samples)

    font = ImageFont.load_default()
    label_widths = [math.ceil(font.getbbox(str(steps))[2]) for steps in columns]
    # Tiny samples that were not enlarged are narrower than the number above them.
    column_width = max(width * scale, *label_widths) + GAP
    row_height = height * scale + GAP
    margin = GAP + max([math.ceil(font.getbbox(name)[2]) + 2 * GAP for name in names], default=0)
    canvas = np.full(
        (LABEL_HEIGHT + rows * row_height, margin + len(columns) * column_width, 3),
        _BACKGROUND,
        np.uint8,
    )
    for column, steps in enumerate(columns):
        left = margin + column * column_width
        for row, image in enumerate(samples[steps][:rows]):
            top = LABEL_HEIGHT + row * row_height
            enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
            canvas[top : top + height * scale, left : left + width * scale] = enlarged

    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for column, steps in enumerate(columns):
        left = margin + column * column_width + max(0, width * scale - label_widths[column]) // 2
        draw.text((left, GAP), str(steps), fill=(0, 0, 0), font=font)
    for row, name in enumerate(names[:rows]):
        top = LABEL_HEIGHT + row * row_height + max(0, height * scale - LABEL_HEIGHT) // 2
        draw.text((GAP, top), name, fill=(0, 0, 0), font=font)
    png = io.BytesIO()
    picture.save(png, format="PNG")
    write_atomically(path, png.getvalue())
    return np.asarray(picture)


def interpolation(
    strips: Mapping[str, np.ndarray], path: str | os.PathLike[str], scale: int | None = None
) -> np.ndarray:
    """Writes a PNG of the paper's interpolation figure: from noise b to noise a, left to right.

    Args:
      strips: name of the row -> uint8 `[num, height, width, channels]`, the samples that start from
        n a + sqrt(1 - n^2) b for n in equal steps from 0 to 1; n stands above them.
      path: of the PNG.
      scale: see `sample_grid`.

    Returns:
      The picture, uint8 `[height, width, 3]`.

    Raises:
      ValueError: if there are no samples, or they are of different shapes.
    """
    images = np.stack(list(strips.values()), axis=1)
    # As many digits as tell the columns apart.
    n = np.linspace(0, 1, len(images)).round(len(str(len(images))))
    columns: dict[Any, np.ndarray] = dict(zip(n.tolist(), images, strict=True))
    return sample_grid(columns, path, scale, rows=len(strips), names=list(strips))


def _common_size(samples: Mapping[int, np.ndarray]) -> tuple[int, int]:
    """Returns the height and width that all samples share."""
    found = {f"{images.dtype}[n, {str(images.shape[1:])[1:-1]}]" for images in samples.values()}
    first = next(iter(samples.values()), np.zeros(0))
    if (
        len(found) != 1
        or first.dtype != np.uint8
        or first.ndim != 4
        or first.shape[3] not in (1, 3)
    ):
        raise ValueError(
            f"samples are {' and '.join(sorted(found)) or 'missing'}: expected one "
            "uint8[n, height, width, 1 or 3] for all step counts"
        )
    return first.shape[1], first.shape[2]


def curve(
    points: Mapping[str, Sequence[tuple[int, float]]],
    path: str | os.PathLike[str],
    ylabel: str,
    title: str,
) -> None:
    """Writes a PNG of distance against number of steps, both axes logarithmic.

    A logarithmic axis has no place for a distance of zero or less (an unbiased estimate can be
    negative): such a point is drawn below all others, as a triangle with its value above it.
    Where no distance is positive, the axis is linear. NaN and infinity are left out.

    Args:
      points: name of the curve -> (step count, distance) in any order.
      path: of the PNG.
      ylabel: what the distance is, with its protocol, such as "FID-10k".
      title: above the picture.

    Raises:
      ValueError: if no distance is finite.
    """
    # Figure and canvas by hand, because pyplot keeps every figure alive and picks a back end that
    # may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    finite = {
        name: sorted((steps, value) for steps, value in line if math.isfinite(value))
        for name, line in points.items()
    }
    step_counts = sorted({steps for line in finite.values() for steps, _ in line})
    if not step_counts:
        raise ValueError(f"nothing to draw in {title!r}: expected at least one finite distance")
    positive = [value for line in finite.values() for _, value in line if value > 0]

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    if positive:
        axes.set_yscale("log")
        # 20 and 30 where the default says 2 x 10^1 and 3 x 10^1.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
    floor = min(positive) / 2 if positive else -math.inf
    for name, line in finite.items():
        xs = [steps for steps, _ in line]
        ys = [value if value > 0 else max(value, floor) for _, value in line]
        (drawn,) = axes.plot(xs, ys, marker="o", label=name)
        for x, y, (_, value) in zip(xs, ys, line, strict=True):
            if y != value:
                axes.plot(x, y, marker="v", markersize=10, color=drawn.get_color())
                axes.annotate(
                    f"{value:.3g}", (x, y), (0, 8), textcoords="offset points", ha="center"
                )
    axes.set_xticks(step_counts, labels=[str(steps) for steps in step_counts])
    axes.set(xlabel="number of steps", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    if len(finite) > 4:  # would cover the lines
        figure.legend(loc="outside right upper")
    else:
        axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())
