"""Peak speeds and list prices of chips: the data of docs/cost.md. Change them here."""

import dataclasses

# SkyPilot's catalogue of list prices, which its bots read off the clouds' own interfaces.
CATALOGUE = "https://github.com/skypilot-org/skypilot-catalog/blob/{}/catalogs/v9/{}/vms.csv"
GOOGLE = CATALOGUE.format("2c3d7ea7d76bf84cf80d382e946c1609571485fd", "gcp")
NEBIUS = CATALOGUE.format("d9bf3aa4d21f5c1e1f3d8fde27adf0204c46fbc8", "nebius")
# The commits have no dates where they were read; the first names an image of 3 June 2026.
READ = "read in November 2026, of June 2026 or later"

# A TPU multiplies float32 by six products of bfloat16 (jax.lax.Precision.HIGHEST).
PRODUCTS_PER_FLOAT32 = 6


@dataclasses.dataclass(frozen=True)
class Chip:
    """What an hour of a chip can do and costs.

    Attributes:
      name: as people say it.
      peak: FLOP/s of dense products in bfloat16.
      peak_float32: the same in float32, not TF32.
      source: of the peak: URL.
      price: US dollars per chip-hour on demand.
      spot: the same, preemptible.
      place: region and type that the prices are of.
      price_source: URL.
    """

    name: str
    peak: float
    peak_float32: float
    source: str
    price: float
    spot: float
    place: str
    price_source: str


def _tpu(name: str, tflops: float, **kwargs) -> Chip:
    return Chip(
        name=name,
        peak=tflops * 1e12,
        peak_float32=tflops * 1e12 / PRODUCTS_PER_FLOAT32,
        source=f"https://docs.cloud.google.com/tpu/docs/{name}",
        price_source=GOOGLE,
        **kwargs,
    )


def _hopper(name: str, **kwargs) -> Chip:
    return Chip(
        name=name,
        peak=989.4e12,  # half of what is advertised, which is with sparsity
        peak_float32=66.9e12,
        source="https://glennklockwood.com/garden/processors/h100",
        price_source=NEBIUS,
        **kwargs,
    )


CHIPS = (
    # A v4-N has N/2 chips: tpu-v4-6144 is 9,891.84 and 2,830.848 an hour.
    _tpu("v4", 275, price=3.22, spot=0.9215, place="us-central2, tpu-v4-6144"),
    _tpu("v5e", 197, price=1.2, spot=0.29771, place="us-central1, tpu-v5litepod-1"),
    _tpu("v6e", 918, price=2.7, spot=0.59266, place="us-central1, tpu-v6e-1"),
    _hopper("H100", price=2.95, spot=1.25, place="eu-north1, gpu-h100-sxm"),
    _hopper("H200", price=3.5, spot=1.45, place="eu-north1, gpu-h200-sxm"),
)
