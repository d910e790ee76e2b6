"""Protocols: what happens between a sample and the network that measures it, each as one record.

Numbers of different protocols are different numbers: they differ by more than papers do.
docs/metrics.md has the table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shortcut_jax.errors import UserError


class Protocol(NamedTuple):
    """How images become what a network sees, and what the distance adds.

    Attributes:
        name: key of its registry.
        quantise: key of `QUANTISE`.
        rule: of `resize.interpolation_matrix`, or `PILLOW`; "none" leaves images as they are.
        scale: grey levels 0..255 -> what the network sees, jax arrays.
        text: what is done to grey levels, in words, for the record of a number.
        offset: added to the diagonal of both covariances before the root of their product.
    """

    name: str
    quantise: str
    rule: str
    scale: Callable[[Any], Any]
    text: str
    offset: float = 0.0


def _centred(v: Any) -> Any:
    return (v - 128) / 128


def _clipped_centred(v: Any) -> Any:
    return _centred(v.clip(0, 255))  # the bicubic kernel overshoots


def _symmetric(v: Any) -> Any:
    return v / 127.5 - 1


def _clipped(v: Any) -> Any:
    return (v / 127.5 - 1).clip(-1, 1)


# Of the small classifiers, for images of one size.
PLAIN = Protocol("plain", "round", "none", _symmetric, "none")

# Of the Inception network.
INCEPTION = {
    protocol.name: protocol
    for protocol in (
        # openai/guided-diffusion, evaluations/evaluator.py, and its samplers. The graph is
        # TensorFlow's, which torch-fidelity reproduces.
        Protocol(
            "adm", "truncate", "corner", _centred,
            "299x299, bilinear TF1 (corner); (v-128)/128",
        ),
        # mseitzer/pytorch-fid, on files as people save them.
        Protocol(
            "pytorch_fid", "round", "half_pixel", _symmetric,
            "299x299, bilinear half-pixel; v/127.5-1",
        ),
        # GaParmar/clean-fid, mode "clean".
        Protocol(
            "clean", "round", "pil_bicubic", _clipped_centred,
            "299x299, bicubic antialiased (Pillow, float), clipped; (v-128)/128",
        ),
        # kvfrans/shortcut-models, helper_inference.py and utils/fid.py: what the paper reports.
        Protocol(
            "authors", "none", "half_pixel", _clipped,
            "299x299, bilinear half-pixel; [-1, 1], clipped", offset=1e-6,
        ),
    )
}  # fmt: skip


# Of the DINOv2 network.
PILLOW = "pillow"  # a rule by itself: Pillow rounds to grey levels after each axis
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


def _imagenet(v: Any) -> Any:
    return (v / 255 - _MEAN) / _STD


DINOV2 = {
    protocol.name: protocol
    for protocol in (
        # calculate_metrics.py of NVlabs/edm2, as it is run.
        Protocol(
            "edm2", "round", "pil_bicubic", _imagenet,
            "224x224, bicubic antialiased, in float; v/255, ImageNet mean and std",
        ),
        # layer6ai-labs/dgm-eval, the code of Stein et al., as it is run.
        Protocol(
            "dgm_eval", "round", PILLOW, _imagenet,
            "224x224, bicubic antialiased (Pillow), rounded to uint8; v/255, ImageNet mean and std",
        ),
    )
}  # fmt: skip


# ---------------------------------------------------------------------- samples to grey levels


def _truncate(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.clip((images + 1.0) * 127.5, 0, 255).astype(np.uint8)


def _round(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.clip(np.rint((images + 1.0) * 127.5), 0, 255).astype(np.uint8)


def _keep(images: NDArray[np.float32]) -> NDArray[np.float32]:
    return (images + 1.0) * np.float32(127.5)


# Name -> what is done to images that are about in [-1, 1], and what it is called in a record.
QUANTISE: dict[str, tuple[Callable[[NDArray[np.float32]], NDArray[Any]], str]] = {
    "truncate": (_truncate, "uint8, (x+1)*127.5 truncated"),
    "round": (_round, "uint8, (x+1)*127.5 rounded"),
    "none": (_keep, "none"),
}


def quantise(rule: str, images: NDArray[Any]) -> NDArray[Any]:
    """Images to grey levels in 0..255.

    Args:
        rule: key of `QUANTISE`.
        images: [n, H, W, C], samples in floating point, about in [-1, 1]; or uint8, which hold
            their grey levels already.

    Returns:
        uint8 of the same shape; float32 for the rule "none".

    Raises:
        UserError: another dtype, or a sample is not finite.
    """
    if images.dtype == np.uint8:
        return images.astype(np.float32) if rule == "none" else images
    if images.dtype.kind != "f":
        raise UserError(
            f"images of dtype {images.dtype} cannot be measured; expected uint8 in 0..255, or "
            "floating point in [-1, 1]: convert them."
        )
    if not np.isfinite(images).all():
        bad = int((~np.isfinite(images)).any(axis=(1, 2, 3)).sum())
        raise UserError(
            f"{bad} of {len(images)} images in a batch have NaN or infinite pixels; expected "
            "finite numbers: check the model that made them for divergence."
        )
    return QUANTISE[rule][0](images.astype(np.float32))
