"""A cache together with what it holds, and a pool of such states.

Cache rows are reused as far as a prompt begins like what was run before. Ids alone do not tell
that: an image's rows have the same ids whatever the picture, so the pictures' digests are kept
with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

import numpy as np

from .prefix import PromptPrefix
from .prompt import PromptIds
from .session import DecoderSession, Float32Array, FloatArray, IdArray

Digests = tuple[str, ...]
"""Of the pictures of a prompt, in the order of their rows."""
FREE_STATES = 4
"""Most states that a pool keeps for later answers; each has a whole cache."""


@dataclass(frozen=True)
class KeptRows:
    """How much of a prompt need not be run.

    Attributes:
        count: rows that the cache holds.
        from_prefix: those of them that the shipped prefix covers.
    """

    count: int
    from_prefix: int


class DecoderState:
    """A cache with the ids and the pictures whose rows it holds.

    Args:
        decoder: what it runs on.
        prefix: the bundle's prompt prefix, written into the cache at once.
    """

    def __init__(self, decoder: DecoderSession, prefix: PromptPrefix | None = None) -> None:
        self.cache = decoder.new_cache()
        self._decoder = decoder
        self._ids: IdArray = np.zeros(self.cache.capacity, np.int32)
        self._images: Digests = ()
        self._prefix = prefix
        self._begin()

    def _begin(self) -> None:
        if self._prefix is not None:
            self._ids[: len(self._prefix)] = self._prefix.ids
            self._prefix.write(self.cache, 0, len(self._prefix))

    @property
    def ids(self) -> IdArray:
        """int32 [length]: the ids in the cache."""
        return self._ids[: self.cache.length]

    def shared_rows(self, prompt: PromptIds, images: Digests) -> int:
        """How many leading rows in the cache are those of ``prompt`` with these pictures."""
        shared = prompt.shared_prefix(self.ids)
        known = min(len(images), len(self._images))
        for index, (first, _) in enumerate(prompt.image_spans):
            if index >= known or images[index] != self._images[index]:
                return min(shared, first)
        return shared

    def rewind(self, prompt: PromptIds, images: Digests = ()) -> KeptRows:
        """Keep the rows that ``prompt`` begins with too, but not its last one.

        The last row is always run, since its logits are needed. Rows of the shipped prefix
        that an earlier prompt has overwritten are put back where that costs less than running
        them.
        """
        shared = self.shared_rows(prompt, images)
        prefix = self._prefix
        covered = 0 if prefix is None else prompt.shared_prefix(prefix.ids)
        if prefix is not None and covered > shared and self.cache.writes_cheaply:
            self._ids[shared:covered] = prefix.ids[shared:covered]
            prefix.write(self.cache, shared, covered)
            shared = covered
        kept = min(shared, len(prompt) - 1)
        self.cache.truncate(kept)
        self._images = images
        return KeptRows(kept, min(kept, covered))

    def forget(self) -> None:
        """Keep nothing but what the cache still holds of the shipped prefix."""
        ids = self.ids[:0] if self._prefix is None else self._prefix.ids
        self.cache.truncate(PromptIds(ids).shared_prefix(self.ids))

    def drop_interrupted(self, kept: int) -> None:
        """After a run that was cut short: only the first ``kept`` rows are to be trusted."""
        self.cache.truncate(kept)
        self.cache.clear_behind()

    def start_anew(self) -> None:
        """After a run that failed: no row is to be trusted, as any may hold a NaN.

        The shipped prefix is written again.
        """
        self.drop_interrupted(0)
        self._images = ()
        self._begin()

    @property
    def chooses_greedily(self) -> bool:
        """As :attr:`DecoderSession.chooses_greedily`."""
        return self._decoder.chooses_greedily

    @property
    def most_choices(self) -> int:
        """As :attr:`DecoderSession.most_choices`."""
        return self._decoder.most_choices

    def prefill(self, prompt: PromptIds, image_embeds: FloatArray) -> Float32Array:
        """Run what the cache lacks of the prompt: logits [V] of its last row."""
        ids = self._note(prompt.ids[self.cache.length :])
        return self._decoder.append(self.cache, ids, image_embeds)

    def decode_one_token(self, id_: int, image_embeds: FloatArray) -> Float32Array:
        """Run one generated token: logits [V] for the next; the image rows are not read."""
        ids = self._note(np.array([id_], np.int32))
        return self._decoder.append(self.cache, ids, image_embeds[:1])

    def decode_greedily(self, id_: int, image_embeds: FloatArray) -> int:
        """Run one generated token: the likeliest next one; see ``chooses_greedily``."""
        ids = self._note(np.array([id_], np.int32))
        return self._decoder.append_greedy(self.cache, ids, image_embeds[:1])

    def decode_guess(self, ids: Sequence[int], image_embeds: FloatArray) -> list[int]:
        """Run a generated token and guesses of what follows it: ids that are chosen indeed.

        Args:
            ids: the token, then the guesses; ``most_choices`` in all at most.

        Returns:
            The guesses that are right, up to the first wrong one, and the id behind them; rows
            of the others are dropped.
        """
        chosen = self._decoder.append_choices(
            self.cache, self._note(np.array(ids, np.int32)), image_embeds[:1]
        )
        right = 0
        while right < len(ids) - 1 and ids[right + 1] == chosen[right]:
            right += 1
        self.cache.truncate(self.cache.length - (len(ids) - 1 - right))
        return chosen[: right + 1]

    def _note(self, ids: IdArray) -> IdArray:
        # Written before the run: whatever interrupts it, ids[:length] are those in the cache.
        start = self.cache.length
        self.cache.require_room(len(ids))
        self._ids[start : start + len(ids)] = ids
        return ids


class StatePool:
    """States that no answer is using, each with what its last answer left in it.

    There is no lock: a lease may end in a finalizer, which the garbage collector can run
    between any two lines here, on this very thread. Every change of ``free`` is one operation
    of a list, which is atomic, and holds whatever others did in between.

    Args:
        decoder: what they run on.
        prefix: the bundle's prompt prefix, if any.
        reuse: False makes every lease begin with the prefix alone.

    Attributes:
        free: those longest unused first, ``FREE_STATES`` at most.
    """

    def __init__(
        self, decoder: DecoderSession, prefix: PromptPrefix | None, reuse: bool
    ) -> None:
        self._decoder = decoder
        self._prefix = prefix
        self._reuse = reuse
        self.free: list[DecoderState] = []

    def new_state(self) -> DecoderState:
        """A state that is not the pool's; its cache holds the prefix."""
        return DecoderState(self._decoder, self._prefix)

    def renew(self, state: DecoderState) -> None:
        """Make a state ready for another conversation."""
        if not self._reuse:
            state.forget()

    def lease(
        self, prompt: PromptIds, images: Digests
    ) -> AbstractContextManager[DecoderState]:
        """The free state that holds most of the prompt; a new one where none is free.

        Of equals the one that has been free longest.
        """
        state = self._take(prompt, images) or self.new_state()
        self.renew(state)
        return _Lease(self, state)

    def give_back(self, state: DecoderState) -> None:
        """End a lease."""
        self.free.append(state)
        del self.free[:-FREE_STATES]

    def _take(self, prompt: PromptIds, images: Digests) -> DecoderState | None:
        while free := self.free.copy():
            best = max(free, key=lambda state: state.shared_rows(prompt, images))
            with suppress(ValueError):  # another answer has it already
                self.free.remove(best)
                return best
        return None


class _Lease(AbstractContextManager[DecoderState]):
    """A state, lent for the block; a class for the reason that ``timings._Pause`` is one."""

    def __init__(self, pool: StatePool, state: DecoderState) -> None:
        self._pool = pool
        self._state = state

    def __enter__(self) -> DecoderState:
        return self._state

    def __exit__(self, *error: object) -> None:
        self._pool.give_back(self._state)
