"""Whether the GPUs of this machine, and what links them, will do for a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tpworker.doctor.check import Check, missing, ok, warning
from tpworker.doctor.libraries import check_cuda_versions, check_flash_attention
from tpworker.observe.affinity import ranges
from tpworker.observe.gpus import remedy, torch_cuda
from tpworker.observe.nvml import Found, Gpu, Nvml, links

LEAST_CAPABILITY = (8, 0)
"""bfloat16 on matrix units; Triton's kernels are tried on 9.0 alone."""

_GIB = 1 << 30


def check_gpus(nvml: Nvml | None, found: Found, num_ranks: int) -> Iterator[Check]:
    """GPUs, driver, links, and what only matters beside them.

    Args:
        nvml: None: there is none to ask.
        found: what `find_gpus` found.
        num_ranks: how many GPUs are needed.
    """
    group = found.gpus[:num_ranks]
    if len(group) < num_ranks:
        why = f": {found.problem}" if found.problem else ""
        yield missing("GPUs", f"{len(found.gpus)} of {num_ranks}{why}", remedy(found))
    yield check_cuda_versions(torch_cuda(), nvml.cuda_version if nvml is not None else None)
    yield check_flash_attention(group[0].capability if group else None)
    if nvml is None:
        return
    if found.problem and len(group) == num_ranks:
        yield warning("GPUs", found.problem, "correct CUDA_VISIBLE_DEVICES")
    for gpu in group:
        yield from _check_gpu(nvml, gpu)
    yield from _check_links(nvml, group)


def _check_gpu(nvml: Nvml, gpu: Gpu) -> Iterator[Check]:
    subject = f"GPU {gpu.index}"
    yield ok(subject, describe(gpu))
    if gpu.capability is not None and gpu.capability < LEAST_CAPABILITY:
        capability = ".".join(map(str, gpu.capability))
        yield missing(
            subject,
            f"compute capability {capability}; {'.'.join(map(str, LEAST_CAPABILITY))} is needed",
            "take an Ampere GPU or a newer one, or use --device cpu",
        )
    if gpu.free is not None and gpu.free < 0.9 * gpu.memory:
        yield warning(
            subject,
            f"{(gpu.memory - gpu.free) / _GIB:.1f} of {gpu.memory / _GIB:.1f} GiB are in use by others",
            "nvidia-smi shows who has them",
        )
    reading = nvml.read(gpu.uuid)
    if reading.ecc_uncorrected:
        yield warning(
            subject,
            f"{reading.ecc_uncorrected} uncorrectable memory errors since the driver was loaded",
            "reset the GPU (nvidia-smi -r), and replace it if they come again",
        )


def describe(gpu: Gpu) -> str:
    """A GPU in one line."""
    parts = [gpu.name, f"{gpu.memory / _GIB:.1f} GiB"]
    if gpu.free is not None:
        parts[-1] += f" ({gpu.free / _GIB:.1f} free)"
    if gpu.capability is not None:
        parts.append("compute capability " + ".".join(map(str, gpu.capability)))
    if gpu.nvlinks:
        parts.append(f"{gpu.nvlinks} NVLinks")
    if gpu.numa_node is not None:
        parts.append(f"NUMA node {gpu.numa_node}")
    if gpu.cpus:
        parts.append(f"CPUs {ranges(gpu.cpus)}")
    if gpu.pci:
        parts.append(gpu.pci)
    return ", ".join(parts)


def _check_links(nvml: Nvml, group: Sequence[Gpu]) -> Iterator[Check]:
    kinds: dict[str, list[str]] = {}
    slow: dict[str, Check] = {}
    for first, second, link in links(nvml, group):
        told = str(link)
        kinds.setdefault(told, []).append(f"{first.index}-{second.index}")
        if link.peer_access is False:
            slow[told] = warning(
                "links",
                told,
                "collectives go through NCCL and the host, which is slow: look for 'iommu' and ACS settings "
                "(nvidia-smi topo -p2p r), or use fewer ranks",
            )
        elif link.peer_access and not link.nvlink:
            slow[told] = warning("links", told, "collectives are slower than over NVLink: use fewer ranks")
    for told, pairs in kinds.items():
        if told in slow:
            check = slow[told]
            yield Check(check.subject, check.state, f"{told}: {', '.join(pairs)}", check.remedy)
        else:
            yield ok("links", f"{told}: {', '.join(pairs)}")
