"""A tokenizer of 100 characters with a chat template, as the files of a model's folder, made without torch."""

import json
import string

from tiny_model import CHAT_TEMPLATE

SPECIAL = ["<|end|>", "<|unknown|>", "<|system|>", "<|user|>", "<|assistant|>"]


def tokenizer_files() -> dict[str, bytes]:
    """Return `tokenizer.json` and `tokenizer_config.json`: a token is a character of printable ASCII, or a special one."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *string.printable])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[token], "content": token} | flags for token in SPECIAL],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|unknown|>"},
    }
    config = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|end|>"}
    return {"tokenizer.json": json.dumps(tokenizer).encode(), "tokenizer_config.json": json.dumps(config).encode()}
