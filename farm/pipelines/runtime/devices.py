"""Devices that pipelines are pinned on, and their settings that decide a picture's bits."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from farm.errors import CatalogError
from farm.pipelines.catalog import Pipeline
from farm.process import cores

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a parameter, by type."""
NONE = "none"
"""Device of a family that computes nothing."""


def device_of(pipeline: Pipeline) -> str:
    """Return the device that a pipeline is pinned on: cuda or cpu.

    Raises:
        CatalogError: the entry requires cuda, and there is none.
    """
    import torch

    if pipeline.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if pipeline.device == "cuda" and not torch.cuda.is_available():
        raise CatalogError(
            f"{pipeline.source} needs the device cuda, but torch finds no CUDA device here. Change "
            "`device`, or use a machine with a GPU."
        )
    return pipeline.device


def dtype_of(pipeline: Pipeline, device: str) -> str:
    """Return the floating point type for a pipeline's weights, as torch names it."""
    if pipeline.dtype == "auto":
        return "float16" if device == "cuda" else "float32"
    return pipeline.dtype


def device_name(device: str) -> str:
    """Return the name that decides the bits of a device: the GPU, or the instruction sets of a CPU.

    For a CPU these are torch's and oneDNN's, for example `cpu AVX512, oneDNN Intel AVX 10.1`.
    """
    if device == NONE:
        return device
    import torch

    if device == "cuda":
        return str(torch.cuda.get_device_name())
    isa = onednn_isa()
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" + (f", oneDNN {isa}" if isa else "")


ISA = re.compile(rb",isa:([^,\n]+)")


@cache
def onednn_isa() -> str:
    """Return the instruction set that oneDNN chose in this process. Empty if torch has no oneDNN.

    oneDNN prints it only in the log of its verbose mode, once, on standard output:
    https://uxlfoundation.github.io/oneDNN/dev_guide_verbose.html
    """
    import torch

    mkldnn: Any = torch.backends.mkldnn
    if not mkldnn.is_available():
        return ""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    before = os.dup(1)
    with tempfile.TemporaryFile() as told:
        try:
            os.dup2(told.fileno(), 1)
            with mkldnn.verbose(mkldnn.VERBOSE_ON):
                torch.zeros(1, 16, 8, 8).to_mkldnn().to_dense()
            libc.fflush(None)
        finally:
            os.dup2(before, 1)
            os.close(before)
        told.seek(0)
        found = ISA.search(told.read())
    return found[1].decode() if found else ""


def thread_count(device: str) -> int:
    """Return torch's threads on a CPU, where they decide how sums are split; 0 on other devices."""
    if device != "cpu":
        return 0
    import torch

    return torch.get_num_threads()


def free_memory(device: str) -> int:
    """Return the free memory of a device now, in bytes."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    return min(_free_of_machine(), _free_of_container())


def usable_memory(device: str) -> int:
    """Return the memory of a device that is free or used by this process, in bytes."""
    if device == "cuda":
        import torch

        return free_memory(device) + int(torch.cuda.memory_reserved())
    resident = 0
    with suppress(OSError):  # not Linux
        resident = int(Path("/proc/self/statm").read_text().split()[1])
    return free_memory(device) + resident * os.sysconf("SC_PAGE_SIZE")


def _free_of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):  # another system without these values
        return sys.maxsize


def _free_of_container() -> int:
    """Return the free bytes of the control group, including its page cache, which can be freed."""
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return most - used + int(pages["file"])
    except (OSError, ValueError, KeyError):  # no limit, or control groups of another version
        return sys.maxsize


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error, or one of its causes, means that memory ran out."""
    cause: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if cause is None:
            return False
        if _says_out_of_memory(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


MAX_CAUSES = 10
"""Maximum number of causes that are followed."""


def _says_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def even_threads(threads: int) -> int:
    """Round torch's threads down to a power of two; 0: its own choice, but at most one per core.

    With 3 or 6 threads, a batch is split within a frame; see slots.
    """
    import torch

    return 1 << (threads or min(torch.get_num_threads(), cores())).bit_length() - 1


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use this number of threads in the block; 0: no change."""
    if not threads:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare_torch(threads: int) -> None:
    """Set this process's threads (0: torch's own choice), and allow only deterministic kernels.

    Must run before anything is loaded on a device.
    """
    # cuBLAS reads this when it starts: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def quieten_libraries() -> None:
    """Keep the libraries' progress bars and hints out of the log."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for quiet in (diffusers_logging, transformers_logging):
        quiet.disable_progress_bar()
        quiet.set_verbosity_error()


CLEAR_REFS = Path("/proc/self/clear_refs")


def watch_peak_memory(device: str) -> None:
    """Reset the peak of memory in use; see peak_memory."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    # 5 resets the peak: https://docs.kernel.org/filesystems/proc.html
    with suppress(OSError):  # another system: the peak stays that since process start
        CLEAR_REFS.write_text("5")


def peak_memory(device: str) -> int:
    """Return the peak of memory in use since watch_peak_memory, in bytes.

    On a GPU: memory that torch had allocated. On the CPU: memory of the whole process, with its
    libraries and weights. If the system cannot reset the peak: the peak since process start.
    """
    import torch

    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
