"""NVIDIA cards, by the driver's own library; where there is no driver it raises, and `inventory` has none."""

from __future__ import annotations

from potluck_protocol.values import Accelerator


def accelerators() -> tuple[Accelerator, ...]:
    """Every card that the driver shows; raises pynvml.NVMLError where there is no driver."""
    import pynvml  # noqa: PLC0415 - loads the driver's library; machines without one never need it

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(
            Accelerator(
                name=str(pynvml.nvmlDeviceGetName(handle)),
                uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for handle in handles
        )
    finally:
        pynvml.nvmlShutdown()
