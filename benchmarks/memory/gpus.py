"""GPUs by name, as their vendor's data sheets describe them, and what of that a program sees.

Tensor-core figures are dense: a data sheet that quotes them "with sparsity" is halved.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# What the driver leaves of a GPU's memory: an 80 GB H100 shows 79.1 GiB, a 24 GB RTX 4090 23.6.
VISIBLE = 0.985
# What error correction leaves where its bits lie in the memory itself (servers' GDDR6): a 48 GB L40S shows 44.4.
CORRECTED = 15 / 16


@dataclass(frozen=True)
class Gpu:
    """gb: memory as the data sheet says. tflops: bf16 with float32 sums, dense. float32_tflops: without tensor cores,
    as torch multiplies float32 by default. tb_per_s: memory bandwidth."""

    name: str
    gb: int
    tflops: float
    float32_tflops: float
    tb_per_s: float
    hopper: bool = False
    corrected: bool = False

    @property
    def memory(self) -> int:
        """Bytes that a process finds."""
        return int(self.gb * 2**30 * VISIBLE * (CORRECTED if self.corrected else 1))

    @property
    def workspace(self) -> int:
        """cuBLAS's, which torch allocates for each thread that multiplies, the autograd engine's too: 32 MiB each on
        Hopper, else 8.1 MiB (torch's CUDABlas defaults)."""
        return 2 * (32 * 2**20 if self.hopper else 2**13 * 1040)


GPUS = {
    # NVIDIA H100 Tensor Core GPU data sheet, SXM: 1,979 TFLOPS bf16 with sparsity, 67 fp32, 3.35 TB/s
    "H100": Gpu("H100 SXM 80GB", 80, 989.5, 67, 3.35, hopper=True),
    # NVIDIA H200 data sheet, SXM: the same chip, 141 GB, 4.8 TB/s
    "H200": Gpu("H200 SXM 141GB", 141, 989.5, 67, 4.8, hopper=True),
    # NVIDIA A100 data sheet, SXM: 312 TFLOPS bf16, 19.5 fp32; 2,039 GB/s with 80 GB, 1,555 GB/s with 40 GB
    "A100-80GB": Gpu("A100 SXM 80GB", 80, 312, 19.5, 2.039),
    "A100-40GB": Gpu("A100 SXM 40GB", 40, 312, 19.5, 1.555),
    # NVIDIA L40S data sheet: 362.05 TFLOPS bf16 (733 with sparsity), 91.6 fp32, 864 GB/s
    "L40S": Gpu("L40S 48GB", 48, 362.05, 91.6, 0.864, corrected=True),
    # NVIDIA L4 data sheet: 242 TFLOPS bf16 with sparsity, 30.3 fp32, 300 GB/s
    "L4": Gpu("L4 24GB", 24, 121, 30.3, 0.3, corrected=True),
    # NVIDIA A10 data sheet: 125 TFLOPS bf16, 31.2 fp32, 600 GB/s
    "A10": Gpu("A10 24GB", 24, 125, 31.2, 0.6, corrected=True),
    # NVIDIA Ada GPU architecture whitepaper, RTX 4090: 165.2 TFLOPS bf16 with fp32 accumulate, 82.6 fp32, 1,008 GB/s
    "RTX4090": Gpu("RTX 4090 24GB", 24, 165.2, 82.6, 1.008),
    # NVIDIA GA102 whitepaper, RTX 3090: 71 TFLOPS bf16 with fp32 accumulate, 35.6 fp32, 936 GB/s
    "RTX3090": Gpu("RTX 3090 24GB", 24, 71, 35.6, 0.936),
    # NVIDIA T4 data sheet: 65 TFLOPS fp16 (its tensor cores have no bf16: take --dtype float16), 8.1 fp32, 320 GB/s
    "T4": Gpu("T4 16GB", 16, 65, 8.1, 0.32, corrected=True),
}


def known_as(device_name: str, total_bytes: int) -> str | None:
    """The key of a GPU that its driver calls so ("NVIDIA A100-SXM4-80GB"), or None; of several, by its memory."""
    words = re.split(r"[^A-Za-z0-9]+", device_name.replace("RTX ", "RTX"))
    alike = [key for key in GPUS if key.split("-")[0] in words]
    return min(alike, key=lambda key: abs(GPUS[key].memory - total_bytes), default=None)
