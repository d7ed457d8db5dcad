"""A rank's process, from its boot message to the loop.

Sizes are agreed on before anything is allocated: each rank loads its shard, says how many KV blocks its
device could hold beside it, and is told the smallest number of all.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from tpworker.checkpoint.weights import dummy_weights, load_weights
from tpworker.errors import ConfigError
from tpworker.ipc.barrier import Barrier
from tpworker.ipc.board import Board, Field, Phase, Row
from tpworker.ipc.channels import Channel, ChannelError, close_all
from tpworker.ipc.child import (
    SCHEDULER_NAME,
    RankBoot,
    RankSettings,
    Report,
    board_names,
    write_report,
)
from tpworker.ipc.deadlines import step_deadline
from tpworker.ipc.limits import available_bytes, usable_cores
from tpworker.ipc.masks import TURNS, MaskBoard
from tpworker.ipc.messages import Allocate, RankLoaded, RankReady
from tpworker.ipc.trace import rank_tellers
from tpworker.ipc.wire import expect
from tpworker.kernels.operands import HostMasks
from tpworker.model.decoder import Decoder
from tpworker.model.families import ModelSpec, read_spec
from tpworker.model.fp8 import check_gpu
from tpworker.model.kv_cache import KVCache, cache_dtype
from tpworker.model.tp import Collectives, Shard
from tpworker.model.weights import DecoderWeights
from tpworker.rank.collectives import LIBRARY_SECONDS, connect
from tpworker.rank.device import CpuDevice, Device, StreamBroken
from tpworker.rank.drafter import Drafter, MtpDrafter, NgramDrafter
from tpworker.rank.kept import HostMemory, KeptMemory
from tpworker.rank.loop import RankLoop
from tpworker.rank.publisher import Publisher
from tpworker.rank.runner import Runner
from tpworker.rank.slots import SlotTable

logger = logging.getLogger(__name__)

SWITCH_INTERVAL = 50e-6
"""Seconds after which a thread must let another have the GIL: launch thread and publisher take turns."""

LINGER_SECONDS = 1.0
_GIB = 1 << 30
T = TypeVar("T")


def rank_main(boot: RankBoot) -> None:
    """What a rank's process does."""
    own_row(boot).enter(Phase.OPENING)
    if boot.settings.device != "cuda":
        run_rank(boot, CpuDevice(), Runner)
        return
    from tpworker.rank.compilations import count_compilations, wake_compiler
    from tpworker.rank.cuda import CudaDevice

    wake_compiler()
    count_compilations(own_row(boot))
    device = CudaDevice(boot.rank)
    if boot.generation:  # a restart: requests wait
        device.warm_up()
    run_rank(boot, device, Runner)


def run_rank(boot: RankBoot, device: Device, runner_class: type[Runner]) -> None:
    """Meets the others, loads this rank's shard, agrees on sizes, then executes plans until told to stop."""
    row = own_row(boot)
    row[Field.PID] = os.getpid()
    plans = Channel.connect(boot.plan_address, boot.name, boot.generation)
    torch.set_num_threads(max(1, usable_cores() // (boot.num_sharing or boot.num_ranks)))
    runner = assemble(boot, device, plans, row, runner_class)
    if device.captures:
        prepare(boot, runner, row)

    def fail(error: BaseException) -> NoReturn:
        while isinstance(error, StreamBroken) and error.__cause__ is not None:
            error = error.__cause__  # what broke the first of the streams
        write_report(boot.report_fd, Report.of(error))
        os._exit(1)

    publisher, loop = connect_loop(boot, device, plans, row, runner, fail)
    with uninterrupted():
        loop.run()
    row.enter(Phase.STOPPING)
    publisher.close()
    device.close()
    close_all(LINGER_SECONDS)


def prepare(boot: RankBoot, runner: Runner, row: Row) -> None:
    """Steps that are captured."""
    row.enter(Phase.WARMING_UP)
    if boot.generation:  # a restart: requests wait
        runner.prepare_late(boot.settings.max_num_batched_tokens)
    else:
        runner.prepare(boot.settings.max_num_batched_tokens, partial(row.enter, Phase.CAPTURING))


def own_row(boot: RankBoot) -> Row:
    """This rank's row of the status board."""
    return Board.attach(boot.board_fd, board_names(boot.num_ranks)).row(boot.name)


def step_deadline_of(boot: RankBoot) -> Callable[[], float]:
    """How many seconds this rank shall wait for what belongs to a step, at present."""
    scheduler = Board.attach(boot.board_fd, board_names(boot.num_ranks)).row(SCHEDULER_NAME)
    return partial(step_deadline, scheduler, boot.settings.step_timeout)


def assemble(
    boot: RankBoot, device: Device, plans: Channel, row: Row, runner_class: type[Runner] = Runner
) -> Runner:
    """From a device to the runner on it: this rank's shard, collectives, a KV cache of the agreed size."""
    settings = boot.settings
    meeting = in_thread(partial(meet, boot, device))  # it takes a second or more, and so does loading
    with torch.inference_mode():
        row.enter(Phase.LOADING)
        kept = open_kept(boot, device)
        spec, shard, weights, kv_dtype = load_shard(boot, device, row, kept)
        row.enter(Phase.MEETING)
        collectives = meeting.result()
        # Drafts are fed behind the end of the longest sequence, and stand there, though to no effect.
        most_positions = settings.max_model_len + settings.num_drafts
        decoder = Decoder(spec, weights, shard, collectives, most_positions, kv_dtype=kv_dtype)
        row.enter(Phase.ALLOCATING)
        slots = make_slots(boot, device, spec, shard, most_positions)
        cache = agree_on_cache(boot, plans, decoder, kv_dtype, device, kept)
        return runner_class(
            decoder,
            cache,
            slots,
            device,
            collectives,
            ring_rows(settings),
            settings.check_ranks_agree,
            settings.max_num_batched_tokens,
            make_drafter(settings, decoder, cache, slots),
        )


def make_slots(
    boot: RankBoot, device: Device, spec: ModelSpec, shard: Shard, most_positions: int
) -> SlotTable:
    """An empty slot table for sequences of so many tokens."""
    settings, vocab = boot.settings, (shard.vocab_start, shard.vocab.local)
    return SlotTable(
        settings.max_num_seqs,
        -(-most_positions // settings.block_size),
        device.torch_device,
        vocab,
        host_masks(boot, device, spec.vocab_size),
        settings.num_drafts,
        most_positions if settings.speculative_method == "ngram" else 0,
    )


def make_drafter(
    settings: RankSettings, decoder: Decoder, cache: KVCache, slots: SlotTable
) -> Drafter | None:
    """What makes drafts, if anything does."""
    if settings.speculative_method == "ngram":
        return NgramDrafter(slots, settings.prompt_lookup_max, settings.prompt_lookup_min)
    if settings.speculative_method == "mtp":
        return MtpDrafter(decoder, cache, slots)
    return None


def host_masks(boot: RankBoot, device: Device, vocab_size: int) -> HostMasks:
    """The masks that the scheduler writes, where the device can read them."""
    board = MaskBoard.attach(boot.masks_fd, boot.settings.max_num_seqs, vocab_size)
    device.map_host(board.address, board.num_bytes)
    rows = torch.frombuffer(board.memory, dtype=torch.int32).view(TURNS, board.num_slots, board.num_words)
    deadline = step_deadline_of(boot)
    return HostMasks(board.written_address, rows, lambda step: board.wait(step, deadline()))


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Does something in a thread of its own, which does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="tpworker-meeting", daemon=True).start()
    return future


def connect_loop(
    boot: RankBoot,
    device: Device,
    plans: Channel,
    row: Row,
    runner: Runner,
    fail: Callable[[BaseException], None],
    spin: float | None = None,
) -> tuple[Publisher, RankLoop]:
    """Puts publisher, barrier and loop around a runner, and says that this rank is ready.

    Args:
        fail: see `Publisher`.
        spin: see `Barrier.attach`.
    """
    settings = boot.settings
    results = partial(Channel.connect, boot.result_address, boot.name, boot.generation)
    launching, publishing = rank_tellers(boot)
    publisher = Publisher(
        boot.generation,
        device,
        ring_rows(settings),
        runner.sampler.ring.shape[1],
        runner.sampler.most_rows,
        settings.max_num_batched_tokens,
        runner.staging,
        row,
        results if boot.rank == 0 else None,
        fail,
        publishing,
    )
    barrier = Barrier.attach(boot.barrier_fd, boot.num_ranks, spin=spin)
    deadline, parts = step_deadline_of(boot), (plans, barrier, row, runner, publisher)
    loop = RankLoop(boot.rank, boot.generation, *parts, deadline, launching)
    plans.send(RankReady(boot.generation, boot.rank))
    row.enter(Phase.READY)
    return publisher, loop


def open_kept(boot: RankBoot, device: Device) -> KeptMemory:
    """What earlier processes of this rank have left, on its kind of device."""
    if device.torch_device.type == "cpu":
        return HostMemory(boot.kept_fd)
    from tpworker.rank import kept_device

    return kept_device.open_kept(boot.kept_fd, boot.keeper_address, device.torch_device)


def meet(boot: RankBoot, device: Device) -> Collectives:
    """The collectives of this rank's kind of device."""
    device.adopt_thread()
    if device.torch_device.type == "cpu":
        deadline = step_deadline_of(boot)
        return connect(boot.meeting_fd, boot.store_fd, boot.rank, boot.num_ranks, deadline)
    from tpworker.rank.cuda_collectives import connect_cuda

    return connect_cuda(boot.store_fd, boot.rank, boot.num_ranks, LIBRARY_SECONDS, device.torch_device)


def ring_rows(settings: RankSettings) -> int:
    """Rows of the token ring: a step more than can be unanswered, so that a free one is always there."""
    return settings.lookahead + 2


def load_shard(
    boot: RankBoot, device: Device, row: Row, kept: KeptMemory
) -> tuple[ModelSpec, Shard, DecoderWeights, torch.dtype]:
    """This rank's shard, and the dtype of keys and values; weights that an earlier process left are taken.

    Raises:
        ModelError: the folder is not a model that is supported, or is broken.
        ConfigError: there is no memory for it, or the GPU has no FP8.
    """
    folder, settings, here = Path(boot.model), boot.settings, device.torch_device
    spec = read_spec(folder, settings.quantization)
    check_gpu(here, weights=spec.quantization is not None, cache=settings.kv_cache_dtype == "fp8")
    shard = Shard.of(spec, boot.rank, boot.num_ranks)
    dtype: torch.dtype = getattr(torch, spec.dtype if settings.dtype == "auto" else settings.dtype)

    def progress(done: int, total: int) -> None:
        row[Field.PROGRESS_TOTAL] = total
        row[Field.PROGRESS_DONE] = row[Field.WEIGHTS] = done

    more: dict[str, Any] = {
        "with_mtp": settings.speculative_method == "mtp",
        "kept": kept if kept.keeps("weights") else None,
    }
    admit = partial(check_room, boot, device)
    if settings.load_format == "dummy":
        weights = dummy_weights(spec, shard, dtype, here, settings.seed, progress, admit, **more)
    else:
        more |= {"fd": boot.weights_fd, "number": boot.weights_number}
        weights = load_weights(folder, spec, shard, dtype, here, progress, admit, **more)
    device.synchronize()  # or the copies would count as part of what comes next
    return spec, shard, weights, cache_dtype(settings.kv_cache_dtype, dtype)


def check_room(boot: RankBoot, device: Device, wanted: int) -> None:
    """Before anything is allocated: whether a rank's weights, of so many bytes, fit into what is free.

    Raises:
        ConfigError: they do not.
    """
    if device.torch_device.type == "cuda":
        free, place = device.free_bytes(boot.num_ranks), f"are free on GPU {boot.rank}"
        remedy = "take more TP ranks, or end what else runs on the GPU (nvidia-smi shows it)"
    else:
        # Some ranks may have begun already: what they hold is part of what there was for all.
        board = Board.attach(boot.board_fd, board_names(boot.num_ranks))
        held = sum(row[Field.WEIGHTS] for row in board.rows())
        free = (available_bytes() + held) // boot.num_ranks
        place = "are available" + (f" for each of {boot.num_ranks} ranks" if boot.num_ranks > 1 else "")
        remedy = (
            "take a smaller model or a --dtype of fewer bytes, end other programs, or raise the container's "
            "memory limit"
        )
    if wanted > free:
        raise ConfigError(
            f"no memory for the weights: a rank's take {wanted / _GIB:.2f} GiB, and {free / _GIB:.2f} GiB "
            f"{place}: {remedy}"
        )


def agree_on_cache(
    boot: RankBoot, plans: Channel, decoder: Decoder, dtype: torch.dtype, device: Device, kept: KeptMemory
) -> KVCache:
    """Offers what fits, allocates what all can hold; or takes what an earlier process of this rank left.

    Raises:
        ConfigError: nothing fits.
        ChannelError: the scheduler did not answer within start_timeout.
    """
    settings, spec, shard = boot.settings, decoder.spec, decoder.shard
    num_layers = spec.num_layers + (decoder.weights.mtp is not None)
    block_bytes = KVCache.bytes_per_block(spec, shard, settings.block_size, dtype, num_layers)
    layout = repr((spec, shard, settings.block_size, dtype, num_layers))
    memory, wanted = kept.find("kv", layout), settings.num_kv_blocks
    if memory is not None and wanted not in (0, memory.nbytes // block_bytes):
        memory = None
    if memory is not None:
        offer = memory.nbytes // block_bytes
    else:
        offer = wanted or blocks_that_fit(boot, device, decoder, block_bytes)
    plans.send(RankLoaded(boot.generation, boot.rank, offer, has_kept=memory is not None))
    answer = plans.receive(settings.start_timeout)
    if answer is None:
        raise ChannelError(
            f"no answer from the scheduler within {settings.start_timeout:g} s (start_timeout)"
        )
    num_blocks = expect(answer, Allocate).num_kv_blocks
    if memory is None or num_blocks != offer:
        memory = kept.make("kv", layout, num_blocks * block_bytes)
        kept.finish("kv")
    block_size = settings.block_size
    return KVCache(spec, shard, num_blocks, block_size, dtype, device.torch_device, num_layers, memory)


def blocks_that_fit(boot: RankBoot, device: Device, decoder: Decoder, block_bytes: int) -> int:
    """How many blocks of the KV cache a rank has memory for, and a use.

    Raises:
        ConfigError: not even two: the null block, and one to be of use.
    """
    settings = boot.settings
    free = device.free_bytes(boot.num_ranks) - decoder.step_bytes(settings.max_num_batched_tokens)
    share = int(max(0, free) * settings.gpu_memory_utilization)
    most = settings.max_num_seqs * -(-settings.max_model_len // settings.block_size) + 1
    if share < 2 * block_bytes:
        raise ConfigError(
            f"no memory for the KV cache beside the model: {share} bytes may be used, one block takes "
            f"{block_bytes}. Raise --gpu-memory-utilization, take a smaller --block-size, or more TP "
            "ranks"
        )
    return min(most, share // block_bytes)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """No garbage collection (80 ms with torch loaded), and no thread keeps the GIL for long."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        sys.setswitchinterval(interval)
