"""What a run config must know about SageMaker's instance types: how many GPUs, and whether these compute in bf16."""

import re

# GPUs by family and size, where a size has more than one (AWS, "Accelerated computing" instance tables).
_ONE_FOUR_EIGHT = {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8}
_GPUS: dict[str, dict[str, int]] = {
    "p2": {"8xlarge": 8, "16xlarge": 16},
    "p3": {"8xlarge": 4, "16xlarge": 8},
    "p3dn": {"24xlarge": 8},
    "p4d": {"24xlarge": 8},
    "p4de": {"24xlarge": 8},
    "p5": {"48xlarge": 8},
    "p5e": {"48xlarge": 8},
    "p5en": {"48xlarge": 8},
    "p6-b200": {"48xlarge": 8},
    "g4dn": {"12xlarge": 4},
    "g5": _ONE_FOUR_EIGHT,
    "g6": _ONE_FOUR_EIGHT,
    "g6e": _ONE_FOUR_EIGHT,
}
# Before NVIDIA's Ampere: K80, V100 and T4.
_WITHOUT_BF16 = frozenset({"p2", "p3", "p3dn", "g4dn"})
_CPU = re.compile(r"^[cmrt]\d")


def gpus(instance_type: str) -> int | None:
    """Return how many NVIDIA GPUs an `ml.<family>.<size>` has: 0 for a CPU instance, None for a family not known here."""
    _, family, size = instance_type.split(".")
    if family in _GPUS:
        return _GPUS[family].get(size, 1)
    return 0 if _CPU.match(family) else None


def has_bf16(instance_type: str) -> bool:
    """Return whether the instance's GPUs compute in bf16; taken as given for families not known here."""
    return instance_type.split(".")[1] not in _WITHOUT_BF16
