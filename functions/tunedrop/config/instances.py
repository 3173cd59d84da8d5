"""Facts about SageMaker's instance types: their GPUs, the speed of these, the images that they run, and local disks."""

import re
from typing import NamedTuple

# GPUs by family and size; a size that is not listed has one. From EC2's DescribeInstanceTypes and "Accelerated computing"
# (https://docs.aws.amazon.com/ec2/latest/instancetypes/ac.html). A test compares the numbers and detects new families.
_ONE_FOUR_EIGHT = {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8}
_ONE_TWO_FOUR_EIGHT = {"12xlarge": 2, "24xlarge": 4, "48xlarge": 8}
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
    "p6-b300": {"48xlarge": 8},
    "p6e-gb200": {"36xlarge": 4},
    "g4dn": {"12xlarge": 4},
    "g5": _ONE_FOUR_EIGHT,
    "g6": _ONE_FOUR_EIGHT,
    "g6e": _ONE_FOUR_EIGHT,
    "g7": _ONE_TWO_FOUR_EIGHT,
    "g7e": _ONE_TWO_FOUR_EIGHT,
}
# CUDA 13 needs NVIDIA's Turing (T4) or newer. It dropped Maxwell, Pascal and Volta, and with them K80 and V100: "Deprecated
# Architectures" in https://docs.nvidia.com/cuda/archive/13.0.0/cuda-toolkit-release-notes/index.html
_WITHOUT_CUDA_13 = frozenset({"p2", "p3", "p3dn"})
_ARM = frozenset({"p6e-gb200"})  # NVIDIA's Grace
# Older than NVIDIA's Ampere: K80, V100 and T4.
_WITHOUT_BF16 = frozenset({"p2", "p3", "p3dn", "g4dn"})
# These machines encrypt their local NVMe disks themselves, and SageMaker refuses a VolumeKmsKeyId for them
# (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_ResourceConfig.html).
_WITH_LOCAL_DISK = frozenset(
    "c5d g4dn g5 g6 g6e g7 g7e m5d p3dn p4d p4de p5 p5e p5en p6-b200 p6-b300 p6e-gb200 r5d trn1 trn1n trn2".split(),
)


class Gpu(NamedTuple):
    """One GPU: its name, dense 16-bit tensor TFLOPS, and memory bandwidth in GB/s, from NVIDIA's data sheets.

    The data sheets of the RTX PRO GPUs have no 16-bit figure; here it is an eighth of their figure for FP4 with sparsity.
    """

    name: str
    tflops: float
    bandwidth: float


_GPU: dict[str, Gpu] = {
    "p3": (_V100 := Gpu("V100", 125, 900)),
    "p3dn": _V100,
    "p4d": Gpu("A100 40 GB", 312, 1555),
    "p4de": Gpu("A100 80 GB", 312, 2039),
    "p5": Gpu("H100", 989, 3350),
    "p5e": (_H200 := Gpu("H200", 989, 4800)),
    "p5en": _H200,
    "p6-b200": Gpu("B200", 2250, 8000),
    "p6-b300": Gpu("B300", 2250, 8000),
    "p6e-gb200": Gpu("GB200", 2500, 8000),
    "g4dn": Gpu("T4", 65, 320),
    "g5": Gpu("A10G", 70, 600),
    "g6": Gpu("L4", 121, 300),
    "g6e": Gpu("L40S", 362, 864),
    "g7": Gpu("RTX PRO 4500", 200, 800),
    "g7e": Gpu("RTX PRO 6000", 500, 1597),
}
_CPU = re.compile(r"^([cmrt]\d|trn\d)")  # Trainium's chips are not GPUs


def gpus(instance_type: str) -> int | None:
    """Return the number of NVIDIA GPUs of `ml.<family>.<size>`: 0 for a CPU instance, None for an unknown family."""
    _, family, size = instance_type.split(".")
    if family in _GPUS:
        return _GPUS[family].get(size, 1)
    return 0 if _CPU.match(family) else None


def gpu(instance_type: str) -> Gpu | None:
    """Return the figures of the instance's GPUs; None without a GPU, or if the GPU is unknown."""
    return _GPU.get(instance_type.split(".")[1])


def has_local_disk(instance_type: str) -> bool:
    """Return whether the instance keeps a job's data on local disks, which a customer key cannot encrypt."""
    return instance_type.split(".")[1] in _WITH_LOCAL_DISK


def has_bf16(instance_type: str) -> bool:
    """Return whether the instance's GPUs compute in bf16; True for an unknown family."""
    return instance_type.split(".")[1] not in _WITHOUT_BF16


def why_not(instance_type: str, image: str) -> str | None:
    """Return why an instance type cannot run an image, by the image's name; None if it can, or if the name does not tell.

    AWS's images have the version of CUDA in their tags: `-cu133-` is 13.3.
    """
    family, cuda = instance_type.split(".")[1], re.search(r"-cu(\d\d)\d\b", image)
    if cuda is None:
        return None
    if family.startswith("trn"):
        return "it has AWS's Trainium chips, and the jobs' image needs NVIDIA's GPUs"
    if family in _WITHOUT_CUDA_13 and int(cuda[1]) >= 13:
        return f"its GPUs are too old for CUDA {cuda[1]}, which the jobs' image uses"
    if family in _ARM and "arm64" not in image:
        return "its CPUs are ARM, and the jobs' image needs x86_64"
    return None
