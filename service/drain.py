"""`Drain`: how the app ends: nothing new is begun, sockets are told to go, and whoever still waits at the end is told.

Rule: it knows whom to tell, not when: that, and what becomes of connections, is for `server.py`.
"""

import asyncio

from service.routers.front import FrontDoor
from service.routers.sockets import Shared
from service.sessions import SessionManager


class Drain:
    """The three stages of an end, to be gone through in order.

    Args:
        manager: has the sessions.
        sockets: knows every socket.
        front: every HTTP call comes in there.
    """

    def __init__(self, manager: SessionManager, sockets: Shared, front: FrontDoor) -> None:
        self._manager = manager
        self._sockets = sockets
        self._front = front

    def begin(self) -> None:
        """From now on the service is not ready and makes no session, and an HTTP answer is its connection's last."""
        self._manager.is_draining = self._front.is_leaving = True

    def go_away(self) -> int:
        """Tells every socket to go, each when what was read from it is answered; those that are yet to come, too.

        Returns:
            How many there are now.
        """
        return self._sockets.go_away()

    @property
    def is_done(self) -> bool:
        """Whether all that was taken is applied and saved, also what nobody waits for any more."""
        return all(engine.batcher.is_idle for engine in self._manager.engines)

    async def cut(self) -> None:
        """Tells whoever still waits that the service ends, and sockets even if their clients do not read."""
        for engine in self._manager.engines:
            await engine.close()
        await asyncio.sleep(0)  # sockets write what they are told when the loop turns
        self._sockets.cut()
