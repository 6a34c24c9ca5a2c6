"""What a bundle takes of a device's memory, to run and to build, before anything is built.

Scratch and build memory follow from the model's sizes by formulas that were fitted to builds
with TensorRT-RTX 1.7.1 on a host without a GPU; nothing here was measured on an Orin. With
weights ``W`` in bytes, ``S`` new tokens, ``L`` rows of cache, ``w`` bytes a value:

    decoder scratch     S (2 ffn + 5 hidden) w  +  2 (S + L) kv w     append form: one layer's
                        past and new keys and values are copied together
                        S (2 ffn + 5 hidden) w  +  L kv w             fixed form: no such copy
    encoder scratch     images tokens (2 mlp + 7 hidden) w
    build, host part    0.4 GB + 2.1 W + 1 byte for each 4-bit weight

Against what was measured: decoder of 1.4B in FP16, S = L = 1024, 60.8 against 60.3 MB, and
S = 1, L = 2047, 16.8 against 16.8 MB; fixed form 8.4 against 8.2 MB; ViT-L/14 17.7 against
17.4 MB. The host part is 0 to 17 % above seven measured builds of 0.3 to 2.6 GB of weights:
encoders, and decoders with a prefill and a decode profile. Decoders with one profile differ
more: three in INT4 took 23 to 26 % less than the formula, one in FP16 16 % more.
A builder that times kernels holds the weights on the GPU too: ``W`` more, in one and the same
memory on a Jetson. That is not measured; TensorRT Edge-LLM asks for 3 to 4 times the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .kv_cache import KvForm
from .targets import Target
from .trt_profiles import LONGEST_CHUNK

Verdict = Literal["fits", "runs only", "too small", "unknown"]

BUILDER = "builder"
BUILD_BASE = 400_000_000
"""Bytes that a builder takes whatever the graph."""
BUILD_FACTOR = 2.1
"""Host bytes of a builder for each byte of weights."""
PLAN_OVERHEAD = 45_000_000
"""Bytes of the three plans beyond their weights; 44 MB was the most that was measured."""
RUNTIME_BYTES = 600_000_000
"""Python, the CUDA context and TensorRT's libraries. Assumed, not measured."""
SYSTEM_BYTES = 1_000_000_000
"""Linux and its services without a desktop. Assumed; a desktop takes about as much again."""
FIRMWARE_SHARE = 0.042
FIRMWARE_LEAST = 800_000_000
"""What firmware keeps back: a 64GB module shows Linux 65.9 of 68.7 GB, a 16GB module 16.4 of
17.2 GB, an 8GB module 7.8 of 8.6 GB."""


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that scratch, cache and buffers follow from.

    Attributes:
        ffn: width of the decoder's MLP.
        kv_width: key-value heads times head size.
        max_length: rows of the cache, prompt and answer together.
        vision_tokens: of one image inside the encoder, its class token included.
        image_rows: of one image's features, before the projector.
        image_tokens: decoder rows of one image.
        images: that one call and one prompt may hold.
        width: bytes of a value: 2 for float16.
        cache_width: of a value in the cache.
    """

    hidden: int
    ffn: int
    kv_width: int
    layers: int
    vocab: int
    max_length: int
    vision_hidden: int
    vision_mlp: int
    vision_tokens: int
    image_rows: int
    image_size: int
    image_tokens: int
    images: int
    width: int
    cache_width: int
    kv_form: KvForm

    @property
    def cache(self) -> int:
        """Bytes of all keys and values."""
        return 2 * self.layers * self.max_length * self.kv_width * self.cache_width

    @property
    def buffers(self) -> int:
        """Bytes of pixels, image features, image rows and logits between the graphs."""
        pixels = 3 * self.image_size**2 * self.width
        features = self.image_rows * self.vision_hidden * self.width
        rows = self.image_tokens * self.hidden * self.width
        return self.images * (pixels + features + rows) + 4 * self.vocab

    @property
    def encoder_scratch(self) -> int:
        """Bytes of scratch of the vision encoder and the projector for all images at once."""
        values = self.vision_tokens * (2 * self.vision_mlp + 7 * self.vision_hidden)
        return self.images * values * self.width

    @property
    def chunk(self) -> int:
        """New tokens of one call at most."""
        return min(self.max_length, LONGEST_CHUNK)

    def decoder_scratch(self, new: int | None = None, past: int | None = None) -> int:
        """Bytes of scratch of the decoder.

        Args:
            new: tokens of one call; None for the most that the prefill profile allows.
            past: rows of the cache before it; None likewise.
        """
        new = self.chunk if new is None else new
        past = self.max_length - 1 if past is None else past
        copied = 2 * (new + past) if self.kv_form == "append" else self.max_length
        activations = new * (2 * self.ffn + 5 * self.hidden)
        return (activations + copied * self.kv_width) * self.width


@dataclass(frozen=True)
class GraphLoad:
    """One graph's weights.

    Attributes:
        weights: bytes.
        four_bit: how many of them are stored in 4 bits.
    """

    name: str
    weights: int
    four_bit: int = 0

    def build_host(self) -> int:
        """Bytes that a builder takes of the host's memory at its peak, weights file apart."""
        return int(BUILD_BASE + BUILD_FACTOR * self.weights + self.four_bit)


@dataclass(frozen=True)
class Part:
    """One line of a plan."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class MemoryPlan:
    """The arithmetic, line by line.

    Attributes:
        run: what answering takes.
        build: what building takes at its peak, which is the largest graph's; empty for a
            target without engines.
        system: what is taken of the module before that; empty where its memory is not known.
        module: bytes of the device's memory; None if it varies.
    """

    run: tuple[Part, ...]
    build: tuple[Part, ...]
    system: tuple[Part, ...]
    module: int | None

    @property
    def run_bytes(self) -> int:
        return sum(part.bytes for part in self.run)

    @property
    def build_bytes(self) -> int:
        return sum(part.bytes for part in self.build)

    @property
    def builder_bytes(self) -> int:
        """The host's part of building, which a build without a GPU takes too."""
        return sum(part.bytes for part in self.build if part.name == BUILDER)

    @property
    def available(self) -> int | None:
        """Bytes of the module that the system leaves; None if that varies."""
        return None if self.module is None else self.module - sum(p.bytes for p in self.system)

    @property
    def verdict(self) -> Verdict:
        """Whether it fits; ``runs only`` if there is too little to build it there."""
        if self.available is None:
            return "unknown"
        if self.run_bytes > self.available:
            return "too small"
        return "fits" if self.build_bytes <= self.available else "runs only"

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the sums."""
        parts = {
            name: [asdict(part) for part in getattr(self, name)]
            for name in ("run", "build", "system")
        }
        return {
            **parts,
            "module": self.module,
            "run_bytes": self.run_bytes,
            "build_bytes": self.build_bytes,
            "available": self.available,
            "verdict": self.verdict,
        }


def plan_memory(graphs: Sequence[GraphLoad], sizes: ModelSizes, target: Target) -> MemoryPlan:
    """The plan of a bundle on a target.

    Args:
        graphs: at least one.
    """
    return MemoryPlan(
        run=(*_weights(graphs), *_work(sizes, target)),
        build=_build(graphs, target) if target.has_engines else (),
        system=_system(target),
        module=target.memory_bytes,
    )


def _weights(graphs: Sequence[GraphLoad]) -> list[Part]:
    return [Part(f"{graph.name} weights", graph.weights, "as stored") for graph in graphs]


def _work(sizes: ModelSizes, target: Target) -> list[Part]:
    cache = Part(
        "keys and values",
        sizes.cache,
        f"2 x {sizes.layers} layers x {sizes.max_length} rows x {sizes.kv_width} x "
        f"{sizes.width} bytes",
    )
    buffers = Part("image buffers", sizes.buffers, f"{sizes.images} images, and the logits")
    if not target.has_engines:
        return [cache, buffers]
    rows = "one layer's past and new rows" if sizes.kv_form == "append" else "one layer's rows"
    return [
        cache,
        buffers,
        Part(
            "encoder scratch",
            sizes.encoder_scratch,
            f"{sizes.images} images x {sizes.vision_tokens} x (2 x {sizes.vision_mlp} + "
            f"7 x {sizes.vision_hidden}) x {sizes.width} bytes",
        ),
        Part(
            "decoder scratch",
            sizes.decoder_scratch(),
            f"{sizes.chunk} x (2 x {sizes.ffn} + 5 x {sizes.hidden}) x {sizes.width} "
            f"bytes, and {rows}",
        ),
        Part("plans", PLAN_OVERHEAD, "kernels and profiles, beyond the weights"),
        Part("runtime", RUNTIME_BYTES, "Python, CUDA context, TensorRT; assumed"),
    ]


def _build(graphs: Sequence[GraphLoad], target: Target) -> tuple[Part, ...]:
    largest = max(graphs, key=GraphLoad.build_host)
    formula = f"0.4 GB + {BUILD_FACTOR} x {largest.weights / 1e9:.2f} GB of the {largest.name}"
    if largest.four_bit:
        formula += f" + {largest.four_bit / 1e9:.2f} G 4-bit weights"
    parts = [Part(BUILDER, largest.build_host(), formula)]
    if target.times_kernels:
        copy = "the weights again, on the GPU, to time kernels; assumed"
        parts.append(Part("timing", largest.weights, copy))
        parts.append(Part("runtime", RUNTIME_BYTES, "Python, CUDA context, TensorRT; assumed"))
    return tuple(parts)


def _system(target: Target) -> tuple[Part, ...]:
    if target.memory_bytes is None:
        return ()
    kept = int(max(FIRMWARE_LEAST, FIRMWARE_SHARE * target.memory_bytes))
    return (
        Part("firmware", kept, f"{FIRMWARE_SHARE:.1%}, at least {FIRMWARE_LEAST / 1e9} GB"),
        Part("system", SYSTEM_BYTES, "Linux without a desktop; assumed"),
    )
