"""The device a pipeline is pinned on, and what of it decides a picture's bits."""

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

NONE = "none"
"""The device of a family that computes nothing"""


def device_of(pipeline: Pipeline) -> str:
    """The device a pipeline is pinned on: cuda or cpu.

    Raises:
        CatalogError: it must be cuda, and there is none.
    """
    import torch

    if pipeline.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if pipeline.device == "cuda" and not torch.cuda.is_available():
        raise CatalogError(
            f"{pipeline.source} wants the device cuda, and torch finds no CUDA device here."
        )
    return pipeline.device


def dtype_of(pipeline: Pipeline, device: str) -> str:
    """The floating point type that a pipeline's weights are loaded in, as torch names it."""
    if pipeline.dtype == "auto":
        return "float16" if device == "cuda" else "float32"
    return pipeline.dtype


def device_name(device: str) -> str:
    """Return the name that decides the bits of a device: the GPU, or the instruction sets of a CPU.

    These are torch's own and oneDNN's: `cpu AVX512, oneDNN Intel AVX 10.1`.
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
    """The instruction set that oneDNN chose in this process; empty where torch is without oneDNN.

    It says so only in the log of its verbose mode, once, on standard output:
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
    """Torch threads in use on a CPU, where they decide how sums are split; 0 elsewhere."""
    if device != "cpu":
        return 0
    import torch

    return torch.get_num_threads()


def free_memory(device: str) -> int:
    """Bytes that are free on a device now."""
    import torch

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return min(_free_of_machine(), _free_of_container())


def _free_of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):  # another system, which does not tell
        return sys.maxsize


def _free_of_container() -> int:
    """What a control group leaves, with the page cache, which would give way."""
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return most - used + int(pages["file"])
    except (OSError, ValueError, KeyError):  # no limit, or control groups of another version
        return sys.maxsize


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that there is no memory left."""
    cause: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if cause is None:
            return False
        if _says_out_of_memory(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


MAX_CAUSES = 10


def _says_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def even_threads(threads: int) -> int:
    """Round torch's threads down to a power of two; 0: its own choice, as far as there are cores.

    A batch that is split into 3 or 6 parts is split within a frame; see slots.
    """
    import torch

    return 1 << (threads or min(torch.get_num_threads(), cores())).bit_length() - 1


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads in the block; 0: as many as now."""
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
    """Set this process's threads (0: torch's own choice), and only kernels that repeat their bits.

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

    quiet: Any
    for quiet in (diffusers_logging, transformers_logging):
        quiet.disable_progress_bar()
        quiet.set_verbosity_error()


CLEAR_REFS = Path("/proc/self/clear_refs")


def watch_peak_memory(device: str) -> None:
    """Begin anew to note the most memory in use; see peak_memory."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    # 5 resets the peak: https://docs.kernel.org/filesystems/proc.html
    with suppress(OSError):  # another system: the peak is that since the process began
        CLEAR_REFS.write_text("5")


def peak_memory(device: str) -> int:
    """The most bytes in use since watch_peak_memory.

    On a GPU those that torch had allocated. On the CPU those of the whole process, its libraries
    and weights included; where the system cannot begin anew, the most since the process began.
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
