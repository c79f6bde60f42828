"""What devices can at most: dense matrix products in 16 bits with float32 accumulation.

NVIDIA's data sheets give figures with 2:4 sparsity, which are twice these.
"""

import re

H100_SXM = 989.0

# TFLOP/s in bfloat16 (float16 for Volta, which has no bfloat16), by what stands in the name that
# CUDA gives the device; the first that is found counts
PEAKS = (
    ("GB200", 2500.0),  # GB200 NVL72: 360 PFLOP/s sparse, of 72
    ("B200", 2250.0),  # HGX B200: 36 PFLOP/s sparse, of 8
    ("GH200", H100_SXM),  # Grace Hopper data sheet
    ("H200 NVL", 835.5),  # H200 data sheet
    ("H200", H100_SXM),
    ("H100 NVL", 835.5),  # H100 data sheet
    ("H100 PCIe", 756.0),
    ("H100", H100_SXM),
    ("A100", 312.0),  # A100 data sheet
    ("A40", 149.7),  # A40 data sheet
    ("A10", 125.0),  # A10 data sheet
    ("L40S", 362.0),  # L40S data sheet
    ("L4", 121.0),  # L4 data sheet
    ("RTX 4090", 165.2),  # Ada architecture white paper, appendix A
    ("RTX 3090", 71.0),  # GA102 architecture white paper, appendix A
    ("V100-SXM2", 125.0),  # V100 data sheet
    ("V100-PCIE", 112.0),
)


def tflops(device_name: str) -> float | None:
    """The peak of a device by CUDA's name of it; None where it is not known.

    An "NVIDIA A10G" is no A10: names are compared word by word.
    """
    for name, peak in PEAKS:
        if re.search(rf"\b{name}\b", device_name):
            return peak
    return None
