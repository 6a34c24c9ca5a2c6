"""The nano model as it is trained: the exporter's own modules, plus heads that are dropped."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from world import COLOR_NAMES, IMAGE_SIZE, MAX_OBJECTS, SHAPES

from mvlm_export.engines.image_processor import CLIP_MEAN, CLIP_STD
from mvlm_export.exporter.config import ModelConfig, TextConfig, VisionConfig
from mvlm_export.exporter.models.clip_vision import ClipVisionEncoder
from mvlm_export.exporter.models.llama import LlamaDecoder
from mvlm_export.exporter.models.projectors import build_projector

CONFIG = ModelConfig(
    vision=VisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    ),
    text=TextConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    ),
)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] as CLIP wants it."""
    unit = pixels.permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)
    return (unit - mean) / torch.tensor(CLIP_STD).view(1, 3, 1, 1)


class NanoTower(nn.Module):
    """The whole CLIP tower, with the warm-up's two heads.

    ``dense`` reads the selected hidden state patch by patch: shape and colour (0 = ground).
    ``presence`` reads the class token after the last layer: how many objects of each shape
    and of each colour there are, so that the tower's unused end is trained as CLIP's is.
    """

    def __init__(self) -> None:
        super().__init__()
        vision = CONFIG.vision
        self.tower = ClipVisionEncoder(vision, keep_class_token=True)
        self.post_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.dense = nn.Linear(vision.hidden_size, 2 + len(SHAPES) + len(COLOR_NAMES))
        classes = (len(SHAPES) + len(COLOR_NAMES)) * (MAX_OBJECTS + 1)
        self.presence = nn.Linear(vision.hidden_size, classes)
        nn.init.normal_(self.tower.embeddings.class_embedding, std=0.02)
        nn.init.normal_(self.tower.embeddings.position_embedding.weight, std=0.02)

    def features(self, pixel_values: Tensor) -> Tensor:
        """hidden_states[-2] with the class token, [B, 1 + patches, C]."""
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixel_values))
        for layer in self.tower.encoder.layers[:-1]:
            hidden = layer(hidden)
        return hidden

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.features(pixel_values)
        last = self.tower.encoder.layers[-1](hidden)
        summary = self.presence(self.post_layernorm(last[:, 0]))
        return self.dense(hidden[:, 1:]), summary.unflatten(-1, (-1, MAX_OBJECTS + 1))


class NanoVlm(nn.Module):
    """Projector and decoder over frozen features, trained on packed questions."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = build_projector(CONFIG)
        self.decoder = LlamaDecoder(CONFIG.text)
        for name, parameter in self.decoder.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 if "embed_tokens" in name else 0.7 * parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std)

    def forward(
        self,
        prefix_ids: Tensor,
        image_features: Tensor,
        input_ids: Tensor,
        positions: Tensor,
        visible: Tensor,
    ) -> Tensor:
        """Hidden states of the rows after the prefix, [B, I + T, hidden] (I image rows).

        Args:
            prefix_ids: [P], the same for the whole batch and so computed once.
            image_features: [B, N, C].
            input_ids: [B, T] after the image.
            positions: [B, I + T].
            visible: bool [B, I + T, P + I + T].
        """
        model, masked = self.decoder.model, self.decoder.MASKED
        prefix = model.embed_tokens(prefix_ids).unsqueeze(0)
        length = prefix_ids.shape[0]
        cos_prefix, sin_prefix = self.decoder.rotary_at(torch.arange(length))
        causal = torch.full((length, length), masked).triu(1)
        image = self.projector(image_features)
        hidden = torch.cat([image, model.embed_tokens(input_ids)], dim=1)
        mask = torch.where(visible, 0.0, masked).unsqueeze(1)
        cos, sin = self.decoder.rotary_at(positions)
        for layer in model.layers:
            empty = prefix.new_zeros(
                1, 0, CONFIG.text.num_key_value_heads, CONFIG.text.head_dim
            )
            prefix, key, value = layer(prefix, cos_prefix, sin_prefix, causal, (empty, empty))
            batch = hidden.shape[0]
            past = (key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1))
            hidden, _, _ = layer(hidden, cos, sin, mask, past)
        return model.norm(hidden)
