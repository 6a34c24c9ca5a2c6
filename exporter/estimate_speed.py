"""How fast a model can be expected to answer: a roofline of each phase, nothing measured.

A phase takes the longer of two times: its products over the GPU's dense peak, and the bytes
that it reads over the memory's bandwidth, each peak taken at a share that can be reached.

    seconds = max(2 MACs / (COMPUTE_SHARE x peak), bytes / (EFFICIENCY x bandwidth))

Decoding one token reads every decoder weight but the token table, and the cache: with the
append form the filled rows three times, as they are read, written as one copy with the new row
and read again; with the fixed form all rows once, filled or not.

The published tokens/s of the paper (MobileVLM V2, arXiv 2402.03766, table 5) are 256 over the
whole time, picture and prompt included, and so is ``tokens_per_second`` here. They were
measured with llama.cpp and a 4-bit language model on a Jetson AGX Orin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mvlm_export.engines.kv_cache import KvForm
from mvlm_export.engines.targets import Target

from .estimate_layers import StoredLayer, attention_macs, decoder_attention_macs
from .geometry import ModelConfig

EFFICIENCY = 0.65
"""Share of the bandwidth; TensorRT Edge-LLM's published figures on Orin are at 65 to 76 %."""
COMPUTE_SHARE = 0.4
"""Share of the dense peak. Assumed: no measurement of this model on an Orin is known."""
PROMPT_TEXT = 56
"""Tokens of a prompt beside the picture's 144: 200 in all, as in the comparison with peers."""
ANSWER = 256
"""Tokens of an answer, as in the paper."""

PAPER = {"v2-1.7b": 51.63, "v2-3b": 30.80, "v2-7b": 15.49}
"""The paper's tokens/s by the name of the geometry."""
PAPER_SETUP = "llama.cpp, 4-bit language model, Jetson AGX Orin, 256 over the whole time"


@dataclass(frozen=True)
class Phase:
    """One phase of an answer.

    Attributes:
        macs: multiply-accumulates; attention is counted without its causal mask.
        bytes: weights and cache that are read.
        seconds: None if the device's peaks are not known.
        bound: ``compute`` or ``memory``, whichever takes longer; None likewise.
    """

    name: str
    macs: int
    bytes: int
    seconds: float | None
    bound: str | None


@dataclass(frozen=True)
class Speed:
    """An answer to a prompt with one picture.

    Attributes:
        prompt: tokens of the prompt, the picture's included.
        answer: tokens of the answer.
        phases: encode, project, prefill, decode; the last is one token, halfway through.
        first_token: seconds until it is known; None if the device's peaks are not known.
        decode_per_second: tokens/s of decoding alone.
        tokens_per_second: tokens over the whole time, by the paper's protocol.
    """

    prompt: int
    answer: int
    phases: tuple[Phase, ...]
    first_token: float | None
    decode_per_second: float | None
    tokens_per_second: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the shares they rest on."""
        return {**asdict(self), "bandwidth_share": EFFICIENCY, "compute_share": COMPUTE_SHARE}


def cache_traffic(row: int, filled: float, capacity: int, form: KvForm) -> int:
    """Bytes that one decoding step moves for its cache.

    Args:
        row: bytes of one position in all layers, keys and values.
        filled: positions before the new token.
        capacity: positions that the cache has room for.
    """
    return int(3 * filled * row) if form == "append" else capacity * row


def estimate_speed(
    config: ModelConfig,
    layers: Mapping[str, Sequence[StoredLayer]],
    target: Target,
    width: int,
    cache_width: int,
) -> Speed:
    """The roofline of a whole answer.

    Args:
        layers: of :func:`.estimate_layers.store_layers`.
        width: bytes of a float value: products in float32 run at half the rate of float16.
        cache_width: bytes of a value in the cache.
    """
    text, form = config.text, target.kv_form
    prompt = min(config.image_tokens + PROMPT_TEXT, text.max_position_embeddings - 1)
    answer = min(ANSWER, text.max_position_embeddings - prompt)
    row = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * cache_width
    filled = prompt + (answer - 1) / 2
    cache = cache_traffic(row, filled, text.max_position_embeddings, form)
    encoder, projector, decoder = (layers[name] for name in layers)
    body, last = _decoder_parts(decoder)
    weights = sum(layer.bytes for layer in (*body, *last))
    attended = decoder_attention_macs(config, 1, round(filled))
    clock = _Clock(target, width)
    phases = (
        clock.phase("encode", encoder, attention_macs(config)),
        clock.phase("project", projector, 0),
        clock.phase(
            "prefill", body, decoder_attention_macs(config, prompt, 0), prompt, last, weights
        ),
        clock.phase("decode", body, attended, 1, last, weights + cache),
    )
    return _speed(prompt, answer, phases)


def _decoder_parts(
    decoder: Sequence[StoredLayer],
) -> tuple[list[StoredLayer], list[StoredLayer]]:
    """What runs for each token, and what runs for the last one alone."""
    products = [stored for stored in decoder if stored.layer.calls]
    return (
        [stored for stored in products if not stored.layer.last_row],
        [stored for stored in products if stored.layer.last_row],
    )


def _speed(prompt: int, answer: int, phases: tuple[Phase, ...]) -> Speed:
    seconds = [phase.seconds for phase in phases]
    known = [value for value in seconds if value is not None]
    if len(known) < len(seconds):
        return Speed(prompt, answer, phases, None, None, None)
    first = sum(known[:-1])
    whole = first + answer * known[-1]
    return Speed(prompt, answer, phases, first, 1 / known[-1], answer / whole)


class _Clock:
    """Turns products and bytes into seconds on one target."""

    def __init__(self, target: Target, width: int) -> None:
        peak, bandwidth = target.fp16_tflops, target.bandwidth_gb_s
        self._floats = None if peak is None else COMPUTE_SHARE * peak * 1e12 * 2 / width
        self._integers = None if peak is None else COMPUTE_SHARE * 2 * peak * 1e12
        self._bytes = None if bandwidth is None else EFFICIENCY * bandwidth * 1e9

    def phase(
        self,
        name: str,
        layers: Sequence[StoredLayer],
        attention: int,
        calls: int = 1,
        once: Sequence[StoredLayer] = (),
        moved: int | None = None,
    ) -> Phase:
        """One phase.

        Args:
            attention: its multiply-accumulates.
            calls: how often each of ``layers`` runs; those in ``once`` run once.
            moved: bytes that are read; None for the layers' own.
        """
        integers = _macs(layers, True) * calls + _macs(once, True)
        floats = _macs(layers, False) * calls + _macs(once, False) + attention
        moved = sum(layer.bytes for layer in (*layers, *once)) if moved is None else moved
        seconds, bound = self._seconds(floats, integers, moved)
        return Phase(name, floats + integers, moved, seconds, bound)

    def _seconds(
        self, floats: int, integers: int, moved: int
    ) -> tuple[float | None, str | None]:
        if self._floats is None or self._integers is None or self._bytes is None:
            return None, None
        compute = 2 * floats / self._floats + 2 * integers / self._integers
        memory = moved / self._bytes
        return max(compute, memory), "compute" if compute > memory else "memory"


def _macs(layers: Sequence[StoredLayer], integer: bool) -> int:
    return sum(stored.layer.macs for stored in layers if stored.integer == integer)
