"""`JsonSocket`: `latch.json`, whose messages `stream.py` lists."""

from functools import partial
from typing import Any

from service.errors import InvalidInput, LatchError, Malformed
from service.queues import Outcome
from service.routers.sockets import JSON, Socket
from service.sessions import Session
from service.wire import StepReply, native


class JsonSocket(Socket):
    """A message is a JSON object; on a socket of many sessions, each names its own."""

    text = True

    def take_now(self, message: bytes | str) -> bool:
        """See `Socket`."""
        session, name = self.single, _NO_NAME
        try:
            if session is None:
                envelope = native.read_envelope(_text(message))
                session, name = self.manager.resident(envelope.session), {"session": envelope.session}
                if session is None or envelope.type == "open":
                    return False
            request = session.engine.codec.decode_step(_text(message), named=self.single is None)
            return self.submit_now(session, request, partial(self._answer, session, name))
        except LatchError as error:
            if isinstance(error, InvalidInput) and name and self.manager.is_shared:
                return False  # the id may be another session's by now, of another model
            self.refuse(session, error, partial(self._answer, session, name))
            return True

    async def take(self, message: bytes | str) -> None:
        """See `Socket`."""
        session, name = self.single, _NO_NAME
        try:
            if session is None:
                envelope = native.read_envelope(_text(message))
                name = {"session": envelope.session}
                if envelope.type == "open":
                    native.check_open(_text(message))
                    session = await self.welcome(envelope.session)
                    return
                session = await self.manager.find(envelope.session)
            else:
                session = self.single = await self.present(session)
            try:
                request = session.engine.codec.decode_step(_text(message), named=self.single is None)
            except InvalidInput:
                if self.single is not None or await self.manager.is_current(session):
                    raise
                session = await self.manager.find(session.id)
                request = session.engine.codec.decode_step(_text(message), named=True)
            await self.submit(session, request, partial(self._answer, session, name))
        except LatchError as error:
            self.refuse(session, error, partial(self._answer, session, name))

    def _answer(self, session: Session | None, name: dict[str, str], outcome: Outcome) -> None:
        if isinstance(outcome, StepReply):
            assert session is not None  # noqa: S101 - who is answered with a reply has asked for a session
            expires_at = self.manager.expires_at(session)
            self.say(session.engine.codec.encode_reply(outcome, expires_at, type="step", **name))
        elif not self.ends(outcome):
            self.say(native.encode({"type": "error"} | name | outcome.to_dict()))

    def hello(self, facts: dict[str, Any], channel: int) -> bytes:
        """See `Socket`."""
        return native.encode({"type": "hello"} | facts)

    def error(self, error: LatchError) -> bytes:
        """See `Socket`."""
        return native.encode({"type": "error"} | error.to_dict())

    def going_away(self, facts: dict[str, Any]) -> bytes:
        """See `Socket`."""
        return native.encode({"type": "going_away"} | facts)


_NO_NAME: dict[str, str] = {}


def _text(message: bytes | str) -> str:
    if isinstance(message, str):
        return message
    raise Malformed(f"a binary message: this socket speaks {JSON}, in text")
