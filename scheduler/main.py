"""What the scheduler process does: from its boot message to its end."""

from __future__ import annotations

import gc
import logging
import os

from tpworker.errors import ConfigError
from tpworker.ipc.board import Board, Field, Phase
from tpworker.ipc.channels import Channel, ChannelError, accept_all, close_all
from tpworker.ipc.child import RANK_NAME, SchedulerBoot, board_names
from tpworker.ipc.kv_events import KvEventPublisher
from tpworker.ipc.masks import MaskBoard
from tpworker.ipc.messages import SchedulerReady, Stop
from tpworker.ipc.trace import scheduler_teller
from tpworker.scheduler.agreement import allocate, take_offers
from tpworker.scheduler.cache_events import CacheEvents
from tpworker.scheduler.kept_blocks import KeptBlocks
from tpworker.scheduler.process import Scheduler

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0
"""For the last message to leave."""


def scheduler_main(boot: SchedulerBoot) -> None:
    """What the scheduler process does: meets everybody, agrees on sizes, then runs."""
    timeout = boot.settings.start_timeout
    board = Board.attach(boot.board_fd, board_names(boot.num_ranks))
    board.rows()[0][Field.PID] = os.getpid()
    board.rows()[0][Field.PHASE] = Phase.LOADING
    plans = [Channel.bind(address) for address in boot.plan_addresses]
    results = Channel.bind(boot.result_address)
    runtime = Channel.connect(boot.runtime_address, boot.name, boot.generation)
    ranks = [RANK_NAME.format(rank) for rank in range(boot.num_ranks)]
    accept_all(list(zip(plans, ranks, strict=True)), boot.generation, timeout)
    num_kv_blocks, are_kept = take_offers(plans, ranks, timeout)
    # Cleared, if at all, before there is a KV cache: see there.
    kept = KeptBlocks(boot.blocks_fd, num_kv_blocks, boot.settings.block_size, are_kept)
    allocate(plans, ranks, boot.generation, num_kv_blocks, timeout)
    results.accept(ranks[0], boot.generation, timeout)
    masks = MaskBoard.attach(boot.masks_fd, boot.settings.max_num_seqs, boot.settings.vocab_size)
    publisher = _publisher(boot)
    events = None if publisher is None else CacheEvents(publisher.put)
    scheduler = Scheduler(
        boot.generation,
        boot.settings,
        num_kv_blocks,
        runtime,
        results,
        plans,
        board,
        masks,
        kept,
        events,
        scheduler_teller(boot),
    )
    num_kept = scheduler.composer.pool.num_cached
    logger.info("%d KV blocks of %d tokens, %d kept", num_kv_blocks, boot.settings.block_size, num_kept)
    runtime.send(SchedulerReady(boot.generation, num_kv_blocks, num_kept))
    board.rows()[0][Field.PHASE] = Phase.READY
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in the middle of a step would be a step gap; see `Scheduler._patience`
    scheduler.run()
    if publisher is not None:
        publisher.close()
    for channel in plans:
        channel.send(Stop(boot.generation))
    close_all(STOP_SECONDS)


def _publisher(boot: SchedulerBoot) -> KvEventPublisher | None:
    """Raises ConfigError: it cannot be where it shall be."""
    settings = boot.settings
    if settings.kv_events is None:
        return None
    try:
        return KvEventPublisher(settings.kv_events, settings.block_size, boot.generation)
    except ChannelError as error:
        raise ConfigError(f"kv_events_config: {error}") from None
