"""The data, the policy and the loop. Imports losses."""

import logging


def _no_kernel_of_theirs(record: logging.LogRecord) -> bool:
    """Whether to let through what bitsandbytes logs when it is imported, as PEFT does for every model.

    On a CPU with AVX512-BF16 it asks for the package `kernels`, whose product nothing here uses.
    """
    return "gemm_4bit_forward" not in record.getMessage()


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_no_kernel_of_theirs)
