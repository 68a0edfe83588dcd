"""Continuous batching as a state machine without a clock: the fake engine's latency model.

It promises vLLM's behaviour as far as a client can tell. Requests wait for a batch slot and for KV blocks
(all of a prompt's; one more each time an answer fills a block; the youngest is preempted when none is
left). A forward pass gives every decoding sequence one token and prefills up to `prefill_chunk_tokens`
of prompts, less what the prefix cache holds. A pass takes

    decode_ms + decode_ms_per_sequence x sequences in it + prefilled tokens / prefill_tokens_per_s

Time comes in as an argument in seconds of any monotonic clock, so a simulator in virtual time and the
server in real time run this same code: call `step` whenever `due` is reached.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from serving.config import FakeEngineConfig
from serving.engine.fake.blocks import BlockPool


class State(Enum):
    """Where a sequence is; FINISHED and ABORTED are final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass(eq=False, slots=True)
class Sequence:
    """One answer in the making. The first fields are the request, the others the scheduler's.

    `output_tokens` 0 is a pooling request: it finishes with its prefill. `block_hashes` are the chained
    hashes of the full blocks of prompt and answer, as far as they are known.
    """

    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[int, ...] = ()
    # Why it will end: "length" when the client set the length, else "stop".
    finish_reason: str = "stop"
    # Called after each step that yielded a token or finished it.
    notify: Callable[[], None] | None = None

    state: State = State.WAITING
    produced: int = 0
    cached_tokens: int = 0
    # Tokens whose keys and values exist (or will at the end of the pass under way).
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    remembered: int = 0
    queued_at: float = 0.0
    scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        return self.prompt_tokens + self.produced


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass brought: sequences that got a token, with its gap to the one before in seconds
    (None for a first token), and sequences that finished."""

    yielded: list[tuple[Sequence, float | None]]
    finished: list[Sequence]


class Scheduler:
    """The batch, its queue and its KV blocks. Not thread-safe."""

    def __init__(self, config: FakeEngineConfig) -> None:
        self._config = config
        self.block_tokens = config.block_tokens
        self.pool = BlockPool(config.kv_blocks)
        self.waiting: deque[Sequence] = deque()
        # An ordered set: oldest first, removal in O(1).
        self.running: dict[Sequence, None] = {}
        # Sequences of the pass under way that get a token when it ends.
        self._yielding: list[Sequence] = []
        self._pass_ends_at: float | None = None
        self._ready_at: float | None = None
        self.prefix_queries_tokens = 0
        self.prefix_hits_tokens = 0
        self.preemptions = 0

    @property
    def due(self) -> float | None:
        """When `step` has something to do; None while the engine is idle."""
        return self._pass_ends_at if self._pass_ends_at is not None else self._ready_at

    def submit(self, sequence: Sequence, now: float) -> None:
        """Queues a sequence. It must fit the KV cache alone: prompt + answer <= blocks x block size."""
        sequence.queued_at = now
        self.waiting.append(sequence)
        if self._pass_ends_at is None and self._ready_at is None:
            self._ready_at = now

    def abort(self, sequence: Sequence) -> bool:
        """Drops a sequence at once and frees its slot and blocks; False when it had already ended."""
        if sequence.state is State.RUNNING:
            del self.running[sequence]
            self._free(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        else:
            return False
        sequence.state = State.ABORTED
        return True

    def step(self, now: float) -> Step:
        """Ends the pass under way, if its time has come, and begins the next.

        The next pass begins when the last one was due to end, so a late caller does not slow the engine;
        a caller later than a whole pass loses that time, so there are never many passes at once.
        """
        due = self.due
        if due is None or now < due:
            return Step([], [])
        result = self._end_pass(now)
        self._ready_at = None
        duration = self._begin_pass(now)
        if duration is None:
            self._pass_ends_at = None
        else:
            self._pass_ends_at = (due if due + duration > now else now) + duration
        return result

    def _end_pass(self, now: float) -> Step:
        yielded: list[tuple[Sequence, float | None]] = []
        finished: list[Sequence] = []
        for sequence in self._yielding:
            if sequence.state is not State.RUNNING:
                continue
            if sequence.output_tokens:
                gap = None if sequence.last_token_at is None else now - sequence.last_token_at
                if sequence.first_token_at is None:
                    sequence.first_token_at = now
                sequence.last_token_at = now
                sequence.produced += 1
                yielded.append((sequence, gap))
            else:
                sequence.first_token_at = sequence.last_token_at = now
            if sequence.produced >= sequence.output_tokens:
                del self.running[sequence]
                self._free(sequence)
                sequence.state = State.FINISHED
                finished.append(sequence)
        self._yielding = []
        return Step(yielded, finished)

    def _begin_pass(self, now: float) -> float | None:
        """Fills the next batch; its duration in seconds, None when there is nothing to do."""
        budget = self._config.prefill_chunk_tokens
        in_pass = 0
        prefilled = 0
        preempted = False
        for sequence in list(self.running):
            if sequence.state is not State.RUNNING:
                continue  # preempted by an older one just now
            missing = sequence.tokens - sequence.computed
            chunk = 1 if missing == 1 else min(missing, budget)
            if chunk == 0:
                continue
            while not self._grow(sequence):
                victim = next(reversed(self.running))
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    break
            else:
                in_pass += 1
                if missing > 1:
                    budget -= chunk
                    prefilled += chunk
                self._compute(sequence, chunk)
        while not preempted and budget and self.waiting and len(self.running) < self._config.batch_slots:
            if not self._admit(self.waiting[0], now):
                break
            sequence = self.waiting.popleft()
            chunk = min(sequence.tokens - sequence.computed, budget)
            budget -= chunk
            prefilled += chunk
            in_pass += 1
            self._compute(sequence, chunk)
        if not in_pass:
            return None
        config = self._config
        return (
            config.decode_ms + config.decode_ms_per_sequence * in_pass
        ) / 1000 + prefilled / config.prefill_tokens_per_s

    def _admit(self, sequence: Sequence, now: float) -> bool:
        """Moves a sequence into the batch if its blocks fit."""
        # The last token is always computed: its logits give the first token of the answer.
        hits = self.pool.match(sequence.block_hashes[: (sequence.tokens - 1) // self.block_tokens])
        new = -(-sequence.tokens // self.block_tokens) - len(hits)
        if new + self.pool.idle(hits) > self.pool.free:
            return False
        self.pool.share(hits)
        sequence.blocks = hits + self.pool.take(new)
        sequence.remembered = len(hits)
        sequence.computed = len(hits) * self.block_tokens
        sequence.state = State.RUNNING
        self.running[sequence] = None
        if sequence.scheduled_at is None:
            sequence.scheduled_at = now
            sequence.cached_tokens = sequence.computed
            self.prefix_queries_tokens += sequence.prompt_tokens
            self.prefix_hits_tokens += sequence.computed
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Makes sure that the sequence's newest token has a block."""
        if len(sequence.blocks) * self.block_tokens < sequence.tokens:
            if not self.pool.free:
                return False
            sequence.blocks += self.pool.take(1)
        return True

    def _compute(self, sequence: Sequence, chunk: int) -> None:
        sequence.computed += chunk
        full = min(sequence.computed // self.block_tokens, len(sequence.block_hashes))
        for i in range(sequence.remembered, full):
            self.pool.remember(sequence.blocks[i], sequence.block_hashes[i])
            sequence.remembered = i + 1
        if sequence.computed == sequence.tokens:
            self._yielding.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Sends a running sequence back to the head of the queue; its blocks are computed again later."""
        del self.running[sequence]
        self._free(sequence)
        sequence.state = State.WAITING
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
