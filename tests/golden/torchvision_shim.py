"""Makes torchvision importable where its compiled part, made for CUDA, cannot be loaded."""


def define_operators(torch) -> None:
    """Defines what torchvision registers without asking; call it before importing torchvision."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    define_operators.library = library  # what it defines goes with it
