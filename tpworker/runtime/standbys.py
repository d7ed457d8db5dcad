"""What the processes of a runtime are forked from: standbys that it starts, and such as join from outside."""

from __future__ import annotations

import threading

from tpworker.ipc.child import RANK_STANDBY, SCHEDULER_STANDBY
from tpworker.runtime.joining import Joining
from tpworker.runtime.standby import AnyStandby, Standby


class Standbys:
    """The standbys of a runtime. Nothing is started before `start`; `close` them.

    All methods may be called from any thread; but see `AnyStandby`, which serves one generation at a time.

    Args:
        scheduler_module, rank_module: what they run.
        device: 'cpu' or 'cuda'.
        joining: where ranks join that are started from outside, which is closed with the standbys; None: they
            have a standby of ours.
    """

    def __init__(
        self, scheduler_module: str, rank_module: str, device: str, joining: Joining | None = None
    ) -> None:
        self._device = device
        self.joining = joining
        self._modules = {SCHEDULER_STANDBY: scheduler_module}
        if joining is None:
            self._modules[RANK_STANDBY] = rank_module
        self._standbys: dict[str, Standby] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def start(self) -> tuple[AnyStandby, ...]:
        """Starts those that do not live, or stand still, which may take some seconds to import; returns the
        schedulers' first, and the ranks' then: one for all, or, of ranks that have joined, one each.

        Raises:
            OSError: one cannot be started; or they have been closed.
            NotJoined: ranks are missing.
        """
        with self._lock:
            if self._is_closed:
                raise OSError("the standbys have been closed")
            joined = () if self.joining is None else self.joining.standbys()
            for name, module in self._modules.items():
                standby = self._standbys.get(name)
                if standby is not None:
                    if standby.is_alive and not standby.stands_still():
                        continue
                    del self._standbys[name]
                    standby.close()
                self._standbys[name] = Standby(name, module, self._device)
            return *(self._standbys[name] for name in self._modules), *joined

    def close(self, why: str = "") -> None:
        """Ends them, and waits until they are gone. Once more does no harm.

        Args:
            why: see `Joining.close`.
        """
        with self._lock:
            self._is_closed = True
            for standby in self._standbys.values():
                standby.close()
            self._standbys.clear()
            if self.joining is not None:
                self.joining.close(why)
