"""Computes the GPU memory of a training, and which models fit on which GPUs.

python -m release.sizing        # prints the table of docs/sizing.md, which explains the formula
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

GB = 1e9
CHUNK = (1 << 26) * 4  # bytes of one chunk of logits in fp32: trainer.token_log_probs.LOGITS_PER_CHUNK
RESERVED = 1.5 * GB  # CUDA's context, cuBLAS's workspace, and fragments that the allocator cannot use


class Model(NamedTuple):
    """The values of a model's config.json on which memory depends."""

    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @property
    def in_layers(self) -> int:
        """The parameters of the layers' matrices, which LoRA adapts and 4 bits shrink."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def beside(self) -> int:
        """The parameters of embeddings and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter(self, rank: int) -> int:
        """Return the parameters of LoRA on all linear layers."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = 2 * (self.hidden + q) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * sides


class Settings(NamedTuple):
    """The values of a run config on which memory depends."""

    sequences: int = 8  # grpo.per_device_train_batch_size
    group: int = 8  # grpo.num_generations
    steps_per_generation: int = 1
    prompt: int = 512
    completion: int = 256
    rank: int = 16
    load_in_4bit: bool = False
    checkpointing: bool = True


class Memory(NamedTuple):
    """Bytes on one GPU."""

    weights: float
    adapter: float
    rollout: float
    loss: float

    @property
    def total(self) -> float:
        """The peak memory."""
        return self.weights + self.adapter + max(self.rollout, self.loss) + RESERVED


def memory(model: Model, settings: Settings, width: int = 2) -> Memory:
    """Return the memory of a training on each GPU under DDP. `width`: bytes of a number, 2 for bf16 and 4 for fp32."""
    groups = -(-settings.sequences // settings.group)
    tokens = groups * settings.prompt + settings.sequences * settings.completion
    scored = settings.sequences * settings.completion
    layers = model.in_layers * (0.52 if settings.load_in_4bit else width)  # nf4 with double quantisation: 4.13 bits
    # The tensors of a layer that its backward needs: norms, q, k, v, attention's output, gate, up and their product.
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    of_layer = width * (6 * model.hidden + 3 * q + 4 * kv + 5 * model.intermediate)
    kept = width * model.hidden * model.layers + of_layer if settings.checkpointing else model.layers * of_layer
    rows = settings.sequences * settings.steps_per_generation
    prompts = -(-rows // settings.group)
    cached = prompts * settings.prompt + rows * settings.completion
    return Memory(
        weights=layers + model.beside * width,
        adapter=(16 + width) * model.adapter(settings.rank),
        # Logits of the last token in fp32, and two copies while sampling.
        rollout=cached * 2 * width * model.layers * kv + rows * model.vocabulary * 12,
        loss=tokens * kept + 3 * CHUNK + scored * model.hidden * 4,
    )


MODELS = [
    Model("SmolLM2-135M", 49152, 576, 1536, 30, 9, 3, 64, True),
    Model("Qwen3-0.6B", 151936, 1024, 3072, 28, 16, 8, 128, True),
    Model("Qwen3-1.7B", 151936, 2048, 6144, 28, 16, 8, 128, True),
    Model("Qwen3-4B", 151936, 2560, 9728, 36, 32, 8, 128, True),
    Model("Llama-3.1-8B", 128256, 4096, 14336, 32, 32, 8, 128, False),
    Model("Qwen3-14B", 151936, 5120, 17408, 40, 40, 8, 128, False),
    Model("Qwen3-32B", 151936, 5120, 25600, 64, 64, 8, 128, False),
    Model("Llama-3.3-70B", 128256, 8192, 28672, 80, 64, 8, 128, False),
]
# The GPUs that compute in bf16, and the memory in GB that their driver shows, which is less than the nominal size.
INSTANCES = {
    "ml.g5, ml.g6 (A10G, L4)": 24.1,
    "ml.p4d (A100)": 42.4,
    "ml.g6e (L40S)": 47.7,
    "ml.p4de, ml.p5 (A100, H100)": 85.0,
    "ml.p5en (H200)": 150.1,
}
BATCHES = (64, 32, 16, 8)


def fit(model: Model, gigabytes: float) -> str:
    """Return the largest micro-batch that fits into this memory, in bf16 if one fits, else in 4 bits."""
    for load_in_4bit in (False, True):
        for sequences in BATCHES:
            needed = memory(model, Settings(sequences=sequences, load_in_4bit=load_in_4bit)).total / GB
            if needed <= gigabytes:
                return f"{'4-bit, ' if load_in_4bit else ''}{sequences} at a time: {needed:.0f} GB"
    return "no"


def table() -> Iterator[str]:
    """Yield the lines of the table in Markdown."""
    yield f"| model | {' | '.join(f'{name}: {gigabytes:.0f} GB' for name, gigabytes in INSTANCES.items())} |"
    yield "|---" * (len(INSTANCES) + 1) + "|"
    for model in MODELS:
        yield f"| {model.name} | {' | '.join(fit(model, gigabytes) for gigabytes in INSTANCES.values())} |"


if __name__ == "__main__":
    sys.stdout.write("\n".join(table()) + "\n")
