"""A small model that sees: Qwen2.5-VL's family, with a tokenizer and a chat template that know images."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from checkpoints import make_checkpoint

# As Qwen2.5-VL's own template tells of images.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_seeing(folder: Path, **overrides: Any) -> Path:
    """Write such a model's folder; ``overrides`` as for ``make_checkpoint``."""
    make_checkpoint("qwen2-5-vl", folder, tokenizer=True, **overrides)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    start, end, image = map(tokenizer.token_to_id, special)
    config = json.loads((folder / "config.json").read_text())
    config |= {"image_token_id": image, "vision_start_token_id": start, "vision_end_token_id": end}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


def image_file(seed: int = 0, height: int = 56, width: int = 84, kind: str = "PNG") -> bytes:
    """A picture of noise, in the format ``kind``."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def data_url(content: bytes, kind: str = "png") -> str:
    """The address of an image that holds all of it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
