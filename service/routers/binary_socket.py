"""`BinarySocket`: `latch.binary`, whose frames `wire/frames.py` describes."""

import asyncio
import time
from contextlib import suppress
from functools import partial
from typing import Any

from service.errors import InvalidInput, LatchError, Malformed
from service.queues import Outcome
from service.routers.sockets import BINARY, MESSAGE_BYTES, Socket
from service.sessions import Session
from service.slab import Slot
from service.wire import Block, StepReply, frames
from service.wire.frames import Frame, Kind
from service.work import BlockReply

_FRAMES, _SECONDS = 16, 0.5e-3  # of a message, after which others have their turn: a million frames fit into one


class _Channel:
    """A session bound to a number on a binary socket."""

    __slots__ = ("number", "outputs", "row_bytes", "session")

    def __init__(self, number: int, session: Session, outputs: list[str] | None) -> None:
        self.number = number
        self.session = session
        self.outputs = session.engine.rows.names(outputs, "$.outputs")
        self.row_bytes = session.engine.rows.input_bytes


class BinarySocket(Socket):
    """A message is one frame or more; on a socket of many sessions, each is on the channel of its own."""

    text = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._channels: dict[int, _Channel] = {}

    async def greet(self, session: Session, channel: int, outputs: list[str] | None) -> None:
        """Binds the channel, then says hello on it."""
        bound = _Channel(channel, session, outputs)
        self._leave(channel, session.id)
        self._channels[channel] = bound
        await super().greet(session, channel, outputs)

    def _leave(self, channel: int, session_id: str = "") -> None:
        """Unbinds a channel, for another session where one is named."""
        before = self._channels.pop(channel, None)
        if before is not None and before.session.id != session_id:
            self._fed.discard(before.session.id)

    def take_now(self, message: bytes | str) -> bool:
        """See `Socket`."""
        if isinstance(message, str) or (frame := frames.read_single(message)) is None:
            return False
        channel = self._channels.get(frame.channel)
        if channel is None:
            return False
        if len(frame.payload) != channel.row_bytes * frame.count:
            return self._take_block(message, channel)
        session, answer = channel.session, partial(self._answer, frame.channel, frame.first_step)
        try:
            request = frames.step_request(frame, channel.outputs, self.shared.max_steps)
            return self.submit_now(session, request, answer)
        except LatchError as error:
            self.refuse(session, error, answer)
            return True

    async def take(self, message: bytes | str) -> None:
        """See `Socket`."""
        try:
            if isinstance(message, str):
                raise Malformed(f"a text message: this socket speaks {BINARY}, in frames")
            start = time.perf_counter()
            for index, frame in enumerate(frames.read(message, self._row_bytes)):
                await self.room()
                if index % _FRAMES == _FRAMES - 1 and time.perf_counter() - start > _SECONDS:
                    async with self.shared.long:  # one message in a turn of the loop, however many there are
                        await asyncio.sleep(0)
                    start = time.perf_counter()
                channel = self._channels.get(frame.channel)
                try:
                    await self._take_frame(frame, channel)
                except LatchError as error:  # of this frame only: where the next one begins is known
                    channel = self._channels.get(frame.channel)  # which a refused OPEN has left
                    answer = partial(self._answer, frame.channel, frame.first_step)
                    self.refuse(channel.session if channel else None, error, answer)
        except LatchError as error:
            error.extras["message"] = self._handled
            number, first_step = error.extras.get("channel", 0), error.extras.pop("first_step", 0)
            channel = self._channels.get(number)
            self.refuse(channel.session if channel else None, error, partial(self._answer, number, first_step))

    def _take_block(self, message: bytes, first: _Channel) -> bool:
        """Handles at once a message that carries the same number of steps for each of many sessions of one model."""
        engine = first.session.engine
        found = frames.read_block(message, engine.rows, first.outputs)
        if found is None:
            return False
        numbers, block = found
        if block.inputs.shape[1] > self.shared.max_steps:
            return False
        channels = [self._channels.get(number) for number in numbers]
        sessions: list[Slot] = []
        for channel in channels:
            if channel is None or channel.session.engine is not engine or channel.outputs != first.outputs:
                return False
            sessions.append(channel.session)
        if len(set(sessions)) < len(sessions) or not engine.batcher.submit_block(
            sessions,
            block,
            partial(self._answer_block, numbers, block),
            lambda i: partial(self._answer, numbers[i], int(block.first_steps[i])),
        ):
            return False
        self.shared.flush_soon()
        self._owed += len(sessions)
        self._takes(first.session, len(sessions) * block.inputs.shape[1], first.outputs)
        return True

    async def _take_frame(self, frame: Frame, channel: _Channel | None) -> None:
        if frame.kind != Kind.STEP and self.single is not None:
            raise InvalidInput("this socket has one session, on channel 0: /v1/stream takes many", path="type")
        if frame.kind != Kind.STEP and channel is not None:
            with suppress(LatchError):  # of a session that is gone: nobody is owed a reply by it
                await self.manager.turn(channel.session)
        if frame.kind == Kind.OPEN:
            try:
                opened = frames.open_request(frame)
                await self.welcome(opened.session, frame.channel, opened.outputs)
            except LatchError:  # what comes behind it on the channel is for that session, and for no other
                self._leave(frame.channel)
                raise
        elif frame.kind == Kind.CLOSE:
            self._leave(frame.channel)
        elif channel is not None:
            request = frames.step_request(frame, channel.outputs, self.shared.max_steps)
            session = channel.session = await self.present(channel.session)
            await self.submit(session, request, partial(self._answer, frame.channel, frame.first_step))

    def _row_bytes(self, number: int) -> int | None:
        channel = self._channels.get(number)
        return channel.row_bytes if channel else None

    def _answer(self, number: int, first_step: int, outcome: Outcome) -> None:
        if isinstance(outcome, StepReply):
            self.say(frames.stepped(number, outcome))
        elif not self.ends(outcome):
            self.say(frames.notice(Kind.ERROR, number, outcome.to_dict(), first_step))

    def _answer_block(self, numbers: list[int], block: Block, outcome: BlockReply) -> None:
        steps = block.inputs.shape[1]
        if all(outcome.applied):
            at_once = max(1, MESSAGE_BYTES // (frames.HEADER.size + len(outcome.replies[0])))
            for start in range(0, len(numbers), at_once):
                part = slice(start, start + at_once)
                firsts, replies = outcome.first_steps[part], outcome.replies[part]
                self.say(frames.stepped_block(numbers[part], steps, firsts, replies), len(firsts))
            return
        for number, first, data, is_applied in zip(numbers, *outcome, strict=True):
            if is_applied:
                self.say(frames.stepped(number, StepReply(block.outputs, data, first, first + steps - 1)))

    def hello(self, facts: dict[str, Any], channel: int) -> bytes:
        """See `Socket`."""
        return frames.notice(Kind.HELLO, channel, facts)

    def error(self, error: LatchError) -> bytes:
        """See `Socket`."""
        return frames.notice(Kind.ERROR, 0, error.to_dict())

    def going_away(self, facts: dict[str, Any]) -> bytes:
        """See `Socket`."""
        return frames.notice(Kind.GOING_AWAY, 0, facts)
