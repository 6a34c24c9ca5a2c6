"""Guess the next tokens from what was read before: speculative decoding without a model.

Answers repeat: a label read off a picture, a word of the question, a list's pattern. Where the
last tokens stand earlier in the text, what followed them there is a good guess of what follows
now. The decoder runs the guess in one call and tells, behind each token, which one it would
have chosen; those that agree are kept. The answer is the one that plain greedy decoding gives,
up to ties that rounding decides, as several rows go through other kernels than one.
(Saxena, "Prompt Lookup Decoding", 2023; Leviathan et al., arXiv 2211.17192, for the check.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .decoder_state import DecoderState
from .session import FloatArray

LONGEST, SHORTEST = 3, 2
"""Tokens that must agree before anything is guessed: the longest run counts first."""

STEP_COSTS = (1.0, 1.15, 1.8, 2.0, 2.3, 2.45, 3.0, 3.1)
"""What a decode step of 1, 2, ... rows takes, in steps of one row.

Measured for 4-bit weights with ONNX Runtime on two CPU cores (docs/performance.md).
"""

_HOPE = 0.7
"""Share of guessed tokens taken to be right before any was checked."""
_MEMORY = 0.85
"""Weight of what was known of that share, at each guess that is checked."""


class PromptLookup:
    """Remembers where each run of tokens stood last.

    Args:
        ids: the tokens so far; ids that name image rows may be among them.
        vocab_size: ids from here on are no tokens and never guessed.
    """

    def __init__(self, ids: Sequence[int], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._ids: list[int] = []
        # The run is looked up before the place behind it is noted, so a place has a next id.
        self._places: dict[tuple[int, ...], int] = {}
        for id_ in ids:
            self.append(id_)

    def append(self, id_: int) -> None:
        """One more token."""
        for size in range(SHORTEST, LONGEST + 1):
            if len(self._ids) >= size:
                self._places[tuple(self._ids[-size:])] = len(self._ids)
        self._ids.append(id_)

    def guess(self, count: int) -> list[int]:
        """What may follow the last token: ``count`` ids at most, none if nothing is known.

        Where the text ends before that, it is taken to go on in the same period.
        """
        place = self._find()
        if place is None or count < 1:
            return []
        period, guessed = len(self._ids) - place, []
        for index in range(count):
            id_ = self._ids[place + index % period]
            if id_ >= self._vocab_size:
                break
            guessed.append(id_)
        return guessed

    def _find(self) -> int | None:
        for size in range(LONGEST, SHORTEST - 1, -1):
            if len(self._ids) >= size:
                place = self._places.get(tuple(self._ids[-size:]))
                if place is not None:
                    return place
        return None


@dataclass
class DraftLength:
    """How many tokens to guess: what the guesses so far have earned.

    With each guessed token right with probability p, independently, k of them give
    (1 - p^(k+1)) / (1 - p) tokens for the cost of a step of k + 1 rows.

    Attributes:
        most: guessed tokens that a step takes at most.
    """

    most: int
    _right: float = field(default=_HOPE, init=False)

    def choose(self) -> int:
        """The number that gives most tokens a step; 0 where guessing does not pay."""
        best, gain = 0, 1.0
        for count in range(1, min(self.most, len(STEP_COSTS) - 1) + 1):
            tokens = sum(self._right**i for i in range(count + 1))
            if tokens / STEP_COSTS[count] > gain:
                best, gain = count, tokens / STEP_COSTS[count]
        return best

    def learn(self, guessed: int, right: int) -> None:
        """What a check found: ``right`` leading tokens of ``guessed`` were right."""
        checked = min(right + 1, guessed)  # those behind the first wrong one say nothing
        for index in range(checked):
            found = 1.0 if index < right else 0.0
            self._right = _MEMORY * self._right + (1 - _MEMORY) * found


class GreedySteps:
    """Greedy decoding of one answer, several tokens a step where a guess holds.

    Args:
        state: holds all rows but that of the last token chosen.
        ids: every token of prompt and answer, the last one chosen included.
        image_embeds: [I, D], I >= 1, of the prompt.
        vocab_size: ids from here on name image rows.
        most: tokens that a step may guess; None for as many as the decoder takes.

    Attributes:
        guessed: tokens that were guessed and run.
        kept: those of them that were right and have been given out by :meth:`next_id`.
    """

    def __init__(
        self,
        state: DecoderState,
        ids: Sequence[int],
        image_embeds: FloatArray,
        vocab_size: int,
        most: int | None = None,
    ) -> None:
        self._state = state
        self._last = ids[-1]
        self._image_embeds = image_embeds
        allowed = max(state.most_choices - 1, 0)
        self._length = DraftLength(allowed if most is None else min(most, allowed))
        self._lookup = PromptLookup(ids, vocab_size) if self._length.most else None
        self._ready: list[int] = []
        self.guessed = self.kept = 0

    def next_id(self, room: int) -> int:
        """The likeliest id behind the last one.

        Args:
            room: tokens that may still be chosen, this one included; at least 1.

        Raises:
            EngineError: as :meth:`DecoderSession.append_greedy`.
        """
        if not self._ready:
            self._ready = self._step(room)[::-1]
        self._last = id_ = self._ready.pop()
        self.kept += bool(self._ready)  # the last one of a step was not guessed
        return id_

    def _step(self, room: int) -> list[int]:
        if self._lookup is None:
            return [self._state.decode_greedily(self._last, self._image_embeds)]
        count = min(self._length.choose(), room - 1)
        guess = self._lookup.guess(max(count, 1))
        if count and guess:
            chosen = self._state.decode_guess([self._last, *guess], self._image_embeds)
            self.guessed += len(guess)
            self._length.learn(len(guess), len(chosen) - 1)
        else:
            chosen = [self._state.decode_greedily(self._last, self._image_embeds)]
            if guess:  # what it would have earned
                self._length.learn(1, int(guess[0] == chosen[0]))
        for id_ in chosen:
            self._lookup.append(id_)
        return chosen
