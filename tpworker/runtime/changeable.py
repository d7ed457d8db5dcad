"""What a runtime's owner may have done to it while it serves: forget, sleep, wake up, take other weights."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from tpworker.errors import RuntimeStopped
from tpworker.runtime.loading import FoundModel
from tpworker.runtime.observable import Observable
from tpworker.runtime.processes import Processes
from tpworker.runtime.sleeping import Sleeping
from tpworker.runtime.weight_source import WeightSource

if TYPE_CHECKING:
    from torch import Tensor


class Changeable(Observable):
    """Verbs for who trains, or shares GPUs. `Runtime` starts and stops, and takes requests."""

    def _make_sleeping(self, processes: Processes, model: FoundModel) -> Sleeping:
        """What does it all, once there are processes."""
        weights = WeightSource(model, with_mtp=self.speculation.method == "mtp")
        return Sleeping(processes, self._intake, self._events, weights)

    async def reset_prefix_cache(self) -> None:
        """Forgets all keys and values that have been computed, in this generation of processes and in those
        that come after a fault: no request that begins to run from now on finds any of them.

        Requests that run go on with their own, and leave none of them to others; those that wait are as new.

        Raises:
            RuntimeStopped, RuntimeFailed: as `generate` does; while it drains it is done, too.
        """
        self._check_up()
        if self.is_sleeping:
            return  # which has forgotten it all
        await self._intake.dispatch.reset_prefix_cache()

    @property
    def is_sleeping(self) -> bool:
        """Whether it takes no requests, from the call of `sleep` until it has been woken up."""
        return self._sleeping is not None and self._sleeping.level is not None

    @property
    def weights_number(self) -> int:
        """Of the weights of the start 0; of those of each `update_weights` greater than of those before."""
        return 0 if self._sleeping is None else self._sleeping.weights_number

    async def sleep(self, level: int = 1, *, abort: bool = False) -> None:
        """Ends the processes in good order, and gives back the memory of weights and KV cache. When it
        returns nothing runs, and nothing of ours is in the memory of GPUs.

        New requests are refused (`RuntimeSleeping`) until it has been woken up. Open ones wait, and go on
        then with the tokens that they would have had: prompt and output so far are computed again.

        Args:
            level: 1: weights can be had again: from their files, or from host memory, where `update_weights`
                has put them if they were tensors. 2: such tensors are dropped, too, and others must come
                before it is woken up.
            abort: end open requests, with the finish reason 'abort', rather than have them wait.

        Raises:
            InvalidRequest: there is no such level.
            RuntimeStopped, RuntimeFailed: it is not started, was stopped, or has failed.
        """
        await self._check_up().sleep(level, abort=abort)
        self._check_not_failed()

    async def wake_up(self, tags: Collection[str] | None = None) -> None:
        """Starts processes again, and takes requests when it returns; nothing, if it does not sleep. If there
        is no memory for it, say, it sleeps on, and may be woken up again.

        Args:
            tags: what is to have its memory again: 'weights', 'kv_cache'; None: both. It sleeps until both
                have been named, and has neither before.

        Raises:
            InvalidRequest: there is no such tag.
            ConfigError, ModelError: what it needs is not there, or not any more.
            RuntimeStopped, RuntimeFailed: as `sleep`; or the weights were dropped and are nowhere else.
        """
        await self._check_up().wake_up(tags)
        self._check_not_failed()

    async def update_weights(
        self,
        source: str | os.PathLike[str] | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        *,
        abort: bool = False,
    ) -> int:
        """Has all that is computed from now on computed with other weights of the same model; the tokenizer
        and the configuration stay. Requests wait meanwhile, and go on: their prompt and output so far are
        computed again with the new weights, and nothing of the old ones is left, nor in the prefix cache.

        While it sleeps, the new weights are what it wakes up with.

        Args:
            source: a folder with config.json and safetensors, which must stay while its weights are served,
                as they may have to be read again; or all tensors by their published names, on any device, in
                any type of floats. They are iterated in a thread, and copied to host memory, where they stay.
            abort: end open requests, with the finish reason 'abort', rather than have them wait.

        Returns:
            The new `weights_number`.

        Raises:
            ModelError: it is another model, or not whole: the old weights serve on.
            InvalidRequest: it is no source of weights; as above.
            RuntimeStopped, RuntimeFailed: as `sleep`.
        """
        number = await self._check_up().update_weights(source, abort=abort)
        self._check_not_failed()
        return number

    def _check_up(self) -> Sleeping:
        """Whether something can be done to it: raises RuntimeFailed or RuntimeStopped."""
        self._home.check_process()
        self._check_not_failed()
        self._home.check()
        if self._state not in ("ready", "draining") or self._sleeping is None:
            raise RuntimeStopped(f"the runtime is {self._state}: this can be done while it is ready")
        return self._sleeping
