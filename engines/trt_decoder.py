"""The decoder on a device: buffers allocated once, the cache bound by address.

Append form: the past is bound to the start of the cache's buffers and the new rows right
behind it, so a step moves no row outside the engine. TensorRT takes addresses that are
multiples of 256 alone; a cache whose rows are no such multiple (``H_kv * head_dim`` elements,
4096 bytes for MobileVLM V2 in float16) gets its new rows in a buffer from which they are
copied behind the past, on the device.

Fixed form: past and present lie at one address, and nothing but ``past_length`` differs from
one decode step to the next, so the step is recorded as a CUDA graph and replayed.

A prompt longer than the prefill profile, or with more image rows, is run in chunks. Of a
greedy answer 4 bytes a token reach the host, where the graph gives the id itself; the step
behind finds its id on the device.

Not run on a GPU yet: see ``device_memory`` and ``trt_engine``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .decoder_buffers import DecoderBuffers
from .device_cache import DeviceKvCache
from .device_memory import ALIGNMENT, Buffer, DeviceMemory, align
from .engine_runner import Engine, EngineRunner, Shape
from .errors import BundleError, EngineError
from .kv_cache import CacheShape, KvCache, KvForm, cache_names
from .manifest import NEXT_TOKEN, ModelSpec, graph_tensors
from .prompt_chunks import PromptChunk, check_ids, split_prompt
from .session import Float32Array, FloatArray, IdArray, not_finite
from .step_replay import StepReplay

_REBUILD = "Build the plans again with `mvlm build`."


class TrtDecoderSession:
    """The decoder; caches are made by it and given to each call.

    The memory's lock makes steps of different answers safe to run from different threads.

    Args:
        engine: the decoder's plan.
        memory: where it runs.
        model: the manifest's.
        kv_form: form of its cache.

    Raises:
        BundleError: the plan is not the manifest's model.
        EngineError: the device has no memory for its buffers.
    """

    name = "decoder"

    def __init__(
        self, engine: Engine, memory: DeviceMemory, model: ModelSpec, kv_form: KvForm
    ) -> None:
        _check_tensors(engine, model, kv_form)
        self._memory = memory
        self._vocab_size = model.vocab_size
        self._past = cache_names("past_key_values", model.num_layers)
        self._present = cache_names("present", model.num_layers)
        self._shape = CacheShape(
            layers=model.num_layers,
            heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            capacity=model.max_positions,
            dtype=engine.tensors[self._past[0]].dtype,
            form=kv_form,
        )
        self._chooses_greedily = NEXT_TOKEN in engine.tensors
        prefill, decode = _order_profiles(engine)
        _check_limits(engine, prefill, decode, self._past[0], self._shape)
        self._prefill = self._decode = engine.open_runner(prefill)
        if decode != prefill:
            self._decode = engine.open_runner(decode)
        self._all_logits = self._measure_logits(engine, prefill) > 1
        rows = engine.limits("input_ids", prefill).high[0] if self._all_logits else 1
        self._io = DecoderBuffers(engine, memory, prefill, rows)
        for runner in (self._prefill, self._decode):
            self._io.bind(runner)
        self._new_rows = self._allocate_new_rows()
        self._held_id: int | None = None  # what the device's first id is, where known
        # What is recorded holds as long as its runner's shapes stay.
        self._replay: StepReplay | None = None
        if kv_form == "fixed" and decode != prefill and not self._io.length_on_host:
            self._replay = StepReplay(memory)

    def _measure_logits(self, engine: Engine, prefill: int) -> int:
        """Rows of logits that two ids give: 1 or 2."""
        ids = min(2, engine.limits("input_ids", prefill).high[0])
        runner = self._prefill
        runner.set_input_shape("input_ids", (ids,))
        runner.set_input_shape("image_embeds", engine.limits("image_embeds", prefill).low)
        past = self._shape.buffer if self._shape.form == "fixed" else self._shape.rows(0)
        for name in self._past:
            runner.set_input_shape(name, past)
        return runner.output_shape("logits")[0]

    @property
    def chooses_greedily(self) -> bool:
        """As :attr:`DecoderSession.chooses_greedily`."""
        return self._chooses_greedily

    @property
    def most_choices(self) -> int:
        """As :attr:`DecoderSession.most_choices`."""
        return int(self._chooses_greedily)

    @property
    def replay_problem(self) -> str | None:
        """Why decode steps are not replayed as one, if they were to be; None otherwise."""
        return self._replay.problem if self._replay is not None else None

    def new_cache(self) -> KvCache:
        """An empty cache of ``max_positions`` rows in the device's memory."""
        return DeviceKvCache(self._shape, self._memory)

    def append(self, cache: KvCache, ids: IdArray, image_embeds: FloatArray) -> Float32Array:
        """As :meth:`DecoderSession.append`."""
        with self._undone_on_error(cache):
            count = self._run(cache, ids, image_embeds)
            return self._io.fetch_logits(count - 1 if self._all_logits else 0)

    def append_greedy(self, cache: KvCache, ids: IdArray, image_embeds: FloatArray) -> int:
        """As :meth:`DecoderSession.append_greedy`."""
        with self._undone_on_error(cache):
            self._run(cache, ids, image_embeds)
            id_ = self._io.fetch_token()
            if not 0 <= id_ < self._vocab_size:
                raise not_finite(f"the token {id_} of {self._vocab_size}")
            self._held_id = id_
        return id_

    def append_choices(
        self, cache: KvCache, ids: IdArray, image_embeds: FloatArray
    ) -> list[int]:
        """As :meth:`DecoderSession.append_choices`: of one id."""
        if len(ids) > self.most_choices:
            raise EngineError(
                f"{len(ids)} choices were asked for, but a plan gives {self.most_choices} at "
                "most; give fewer ids."
            )
        return [self.append_greedy(cache, ids, image_embeds)]

    @contextmanager
    def _undone_on_error(self, cache: KvCache) -> Iterator[None]:
        with self._memory.lock:
            length = cache.length
            try:
                yield
            except BaseException:
                cache.truncate(length)
                raise

    def _run(self, cache: KvCache, ids: IdArray, image_embeds: FloatArray) -> int:
        """Queue ``ids`` behind the cache; gives the number of ids in the last chunk."""
        cache.require_room(len(ids))
        ids = np.asarray(ids, np.int32)
        check_ids(ids, self._vocab_size, len(image_embeds))
        count, limits = 0, (self._io.most_ids, self._io.most_rows)
        for chunk in split_prompt(ids, self._vocab_size, *limits):
            # What is staged for the run before, even an interrupted one, is in use till then.
            self._memory.synchronize()
            self._run_chunk(cache, chunk, image_embeds)
            count = len(chunk.ids)
            cache.advance(count)
        return count

    def _run_chunk(self, cache: KvCache, chunk: PromptChunk, image_embeds: FloatArray) -> None:
        count = len(chunk.ids)
        runner = self._decode if count == 1 else self._prefill
        held, self._held_id = self._held_id, None
        if count > 1 or chunk.ids[0] != held:
            self._io.send_ids(chunk.ids)
        if chunk.row_count:
            used = image_embeds[chunk.first_row : chunk.first_row + chunk.row_count]
            self._io.send_rows(used)
        self._io.stage_length(cache.length)

        def enqueue() -> None:
            self._io.send_length()
            self._io.set_shapes(runner, count, chunk.row_count)
            self._bind_cache(runner, cache, count)
            runner.execute()
            self._io.keep_token()

        if self._replay is not None and count == 1:
            self._replay.run(cache, runner, enqueue)
        else:
            enqueue()
            self._move_new_rows(cache, count)

    def _bind_cache(self, runner: EngineRunner, cache: KvCache, count: int) -> None:
        for tensor, name in enumerate(self._past):
            runner.set_input_shape(name, cache.past_shape)
            runner.set_tensor_address(name, cache.past_address(tensor))
        for tensor, name in enumerate(self._present):
            runner.set_tensor_address(name, self._place_of_new_rows(cache, tensor))

    # New rows whose place behind the past is no address for TensorRT.

    def _allocate_new_rows(self) -> Buffer | None:
        shape = self._shape
        if shape.form == "fixed" or shape.row_bytes % ALIGNMENT == 0:
            return None
        return self._memory.allocate(shape.tensors * self._new_rows_pitch)

    @property
    def _new_rows_pitch(self) -> int:
        return align(self._io.most_ids * self._shape.row_bytes)

    def _place_of_new_rows(self, cache: KvCache, tensor: int) -> int:
        if self._new_rows is None:
            return cache.new_address(tensor)
        return self._new_rows.address + tensor * self._new_rows_pitch

    def _move_new_rows(self, cache: KvCache, count: int) -> None:
        if self._new_rows is None:
            return
        size = count * self._shape.row_bytes
        for tensor in range(self._shape.tensors):
            source = self._place_of_new_rows(cache, tensor)
            self._memory.copy(cache.new_address(tensor), source, size)


def _order_profiles(engine: Engine) -> tuple[int, int]:
    """(prefill, decode): the profile with most new tokens and that with fewest."""

    def most_ids(profile: int) -> int:
        return engine.limits("input_ids", profile).high[0]

    profiles = range(engine.profile_count)
    return max(profiles, key=most_ids), min(profiles, key=most_ids)


def _check_tensors(engine: Engine, model: ModelSpec, kv_form: KvForm) -> None:
    tensors = engine.tensors
    inputs, outputs = graph_tensors("decoder", model.num_layers, kv_form)
    wanted = {*inputs, *outputs, *(tensors.keys() & {NEXT_TOKEN})}
    different = sorted(wanted ^ tensors.keys())
    if different:
        raise BundleError(
            "The decoder's plan has not the tensors of the manifest's model (different: "
            f"{', '.join(different[:4])}). {_REBUILD}"
        )
    past, logits = tensors[inputs[-1]], tensors["logits"]
    heads = 1 if kv_form == "fixed" else -2
    found = (past.shape[heads], past.shape[-1], logits.shape[-1], logits.dtype)
    needed = (model.num_key_value_heads, model.head_dim, model.vocab_size, "float32")
    if found != needed:
        raise BundleError(
            "The decoder's plan has KV heads, head size, vocabulary and logits of "
            f"{', '.join(map(str, found))}, but the manifest's model needs "
            f"{', '.join(map(str, needed))}. {_REBUILD}"
        )


def _check_limits(
    engine: Engine, prefill: int, decode: int, past: str, shape: CacheShape
) -> None:
    """The profiles must admit every step that the cache has room for."""
    if shape.form == "fixed":
        pasts = [shape.buffer]
    else:
        pasts = [shape.rows(0), shape.rows(shape.capacity - 1)]
    width = engine.tensors["image_embeds"].shape[-1]
    needed: list[tuple[int, str, Shape]] = [(decode, "input_ids", (1,))]
    for profile in (prefill, decode):
        needed += [(profile, past, rows) for rows in pasts]
        needed.append((profile, "image_embeds", (1, width)))
    for profile, name, wanted in needed:
        if not engine.limits(name, profile).admits(wanted):
            raise BundleError(
                f"Profile {profile} of the decoder's plan does not take {list(wanted)} as "
                f"{name!r}: it was built for another length. {_REBUILD}"
            )
