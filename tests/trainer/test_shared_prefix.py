"""SharedPrefixGRPOTrainer compared with TRL's trainer: gradients, metrics and completions."""

import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from local_app.base_model import fetch
from trainer import run_trainer, shared_prefix, shared_prefix_sampling
from trainer import train as training_job
from trainer.run_trainer import SharedPrefixGRPOTrainer
from trainer.shared_prefix import Packed, attention
from trainer.shared_prefix_models import unsupported

MODELS = Path(__file__).parents[2] / ".tunedrop/models"
GENERATIONS = 4
PROMPTS = ["a", "to be or not to be", "say xyz", "hello"]
LENGTHS = [12, 3, 1, 7, 12, 12, 2, 5, 1, 1, 2, 2, 12, 12, 12, 12]
END = 0
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def completions():
    """Sixteen completions of uneven length, every second ended, the rest cut off; some of a group are equal."""
    draw = torch.Generator().manual_seed(3)
    made = [torch.randint(5, 100, (length,), generator=draw).tolist() for length in LENGTHS]
    made = [[*ids[:-1], END] if row % 2 else ids for row, ids in enumerate(made)]
    made[5] = made[6] = made[4]
    return made


def reward(completion_ids, **_):
    """Depends on the completion alone; all equal in the last group, which then has no advantage."""
    return [0.5 if len(ids) == 12 and row >= 12 else sum(ids) % 7 / 7 for row, ids in enumerate(completion_ids)]


class Gradients(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Keeps the gradient of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.steps.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.requires_grad]))


def build(cls, folder, output, load=None, lora=None, perturb=True, **settings):
    gradients = Gradients()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **(load or {}))
    defaults = {
        "output_dir": str(output), "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no", "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_steps": 2,
        "num_generations": GENERATIONS, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
        "max_completion_length": 12, "activation_checkpointing": False, "shuffle_dataset": False, "max_grad_norm": 0.0,
    }  # fmt: skip
    trainer = cls(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(**defaults | settings),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        peft_config=LoraConfig(**LORA | (lora or {})),
        callbacks=[gradients],
    )
    if perturb:  # a fresh adapter changes nothing: errors in what it sees would not show
        draw = torch.Generator().manual_seed(1)
        for each in trainer.model.parameters():
            if each.requires_grad:
                # TRL makes the adapter of quantized weights bf16, whose rounding would hide what is compared here.
                each.data = each.data.float() + 0.05 * torch.randn(each.shape, generator=draw)
    return trainer, gradients.steps


def train(cls, folder, output, monkeypatch, **settings):
    """Train on the fixed completions, in the order of the data; returns the trainer, gradients and logged metrics."""
    trainer, steps = build(cls, folder, output, **settings)
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *_: (completions(), None))
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))  # micro-batches are the same
    trainer.train()
    logged = [{k: v for k, v in each.items() if k != "step_time"} for each in trainer.state.log_history if "loss" in each]
    return trainer, steps, logged


def assert_equal(folder, output, monkeypatch, **settings):
    _, expected, expected_log = train(GRPOTrainer, folder, output, monkeypatch, **settings)
    trainer, found, found_log = train(SharedPrefixGRPOTrainer, folder, output, monkeypatch, **settings)
    assert len(found) == len(expected) == trainer.state.max_steps
    for stock, ours in zip(expected, found, strict=True):
        assert torch.cosine_similarity(stock, ours, dim=0) >= 0.9999
        assert ours.norm().item() == pytest.approx(stock.norm().item(), rel=1e-3)
    for stock_step, our_step in zip(expected_log, found_log, strict=True):
        assert our_step == pytest.approx(stock_step, rel=1e-5, abs=5e-6)
    return found


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


@pytest.mark.parametrize(
    "settings", [{}, {"beta": 0.1, "num_iterations": 2, "max_steps": 2}], ids=["once", "twice, with KL"]
)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_loss_and_its_gradient_are_those_of_trl(tiny, tmp_path, monkeypatch, loss_type, settings):
    steps = assert_equal(tiny, tmp_path, monkeypatch, loss_type=loss_type, **settings)
    assert all(step.norm() > 1e-4 for step in steps)


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_truncated_completions": True},
        {"mask_truncated_completions": True, "loss_type": "grpo", "beta": 0.1},
        {"temperature": 0.6, "beta": 0.1},
        {"importance_sampling_level": "sequence", "num_iterations": 2, "max_steps": 2, "loss_type": "grpo"},
        {"top_entropy_quantile": 0.4},
        {"entropy_coef": 0.3},
        {"use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef_max": 1.0, "entropy_coef_delta": 0.1},
        {"scale_rewards": "batch"},
        {"delta": 1.1, "num_iterations": 2, "max_steps": 2},
        {"pad_to_multiple_of": 8},
        {"activation_checkpointing": True},
        {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "beta": 0.1},  # groups are cut
        {"steps_per_generation": 4, "max_steps": 4, "per_device_train_batch_size": 4},  # several updates per rollout
    ],
    ids=str,
)
def test_so_with_every_setting_that_touches_the_loss(tiny, tmp_path, monkeypatch, settings):
    assert_equal(tiny, tmp_path, monkeypatch, **settings)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_so_with_lora_on_four_bit_weights(tiny, tmp_path, monkeypatch, beta):
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    assert_equal(tiny, tmp_path, monkeypatch, load={"quantization_config": four_bit}, beta=beta)


SMALL = {
    "vocab_size": 105, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "eos_token_id": END, "pad_token_id": END, "initializer_range": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(head_dim=16, num_key_value_heads=1, **SMALL),
        LlamaConfig(num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, **SMALL),
    ],
    ids=["qwen3", "llama"],
)
def test_so_with_other_models(tiny, tmp_path, monkeypatch, config):
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    assert_equal(tmp_path / "model", tmp_path, monkeypatch, beta=0.1)


def test_groups_without_advantage_are_computed_without_a_backward(tiny, tmp_path, monkeypatch):
    tokens = {True: 0, False: 0}

    def counted(model, packed, *rest):
        tokens[torch.is_grad_enabled()] += packed.input_ids.numel()
        return shared_prefix.backbone(model, packed, *rest)

    monkeypatch.setattr(run_trainer, "backbone", counted)
    assert_equal(tiny, tmp_path, monkeypatch, max_steps=1)
    last = AutoTokenizer.from_pretrained(tiny).apply_chat_template(
        [{"role": "user", "content": PROMPTS[-1]}], add_generation_prompt=True, return_dict=False
    )
    assert tokens[False] == len(last) + sum(length - 1 for length in LENGTHS[12:])
    assert tokens[True] > tokens[False]

    monkeypatch.setitem(globals(), "reward", lambda completion_ids, **_: [1.0] * len(completion_ids))
    tokens[True] = 0
    _, [expected], [expected_log] = train(GRPOTrainer, tiny, tmp_path, monkeypatch, max_steps=1)
    _, [found], [found_log] = train(SharedPrefixGRPOTrainer, tiny, tmp_path, monkeypatch, max_steps=1)
    assert tokens[True] == 0
    assert torch.equal(found, expected)  # zeros, not nothing: weight decay and momentum go on as in TRL
    assert found_log == pytest.approx(expected_log, rel=1e-5, abs=5e-6)


def test_equal_completions_of_a_prompt_are_packed_once():
    packed = Packed([[7, 8], [7, 8], [9], [7, 8]], [[1, 2, 3], [1, 2, 3], [1], []], 4, torch.device("cpu"))
    assert packed.input_ids.tolist() == [[7, 8, 1, 2, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0]]
    assert packed.sources.tolist() == [1, 2, 3, 4]
    assert packed.targets.tolist() == [1, 2, 3, 1]
    assert packed.index.tolist() == [[0, 1, 2, 4], [0, 1, 2, 4], [3, 4, 4, 4], [4, 4, 4, 4]]


def test_both_kinds_of_attention_are_that_of_whole_sequences():
    torch.manual_seed(0)
    prefix = [torch.randn(5, heads, 8, requires_grad=True) for heads in (6, 2, 2)]
    own = [torch.randn(3, 4, heads, 8, requires_grad=True) for heads in (6, 2, 2)]
    whole = [
        torch.cat([far.expand(3, -1, -1, -1), near], dim=1).transpose(1, 2) for far, near in zip(prefix, own, strict=True)
    ]
    plain = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True, scale=0.3, enable_gqa=True)
    outs = [plain.transpose(1, 2)[:, 5:]] + [attention(own, prefix, 0.3, fused=fused) for fused in (True, False)]
    weights = torch.randn(outs[0].shape)
    gradients = [torch.autograd.grad((out * weights).sum(), [*own, *prefix[1:]], retain_graph=True) for out in outs]
    for out, gradient in zip(outs[1:], gradients[1:], strict=True):
        torch.testing.assert_close(out, outs[0])
        torch.testing.assert_close(gradient, gradients[0])


def in_turn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What `varlen_attn` computes on a GPU: causal attention of one sequence after another, aligned at the ends."""
    assert (window_size, enable_gqa) == ((-1, 0), True)
    assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
    out = []
    for start, end, first, last in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        q, k, v = query[start:end], key[first:last], value[first:last]
        seen = torch.arange(len(k))[None] <= torch.arange(len(q))[:, None] + len(k) - len(q)
        parts = (each.transpose(0, 1)[None] for each in (q, k, v))
        out.append(torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=seen, scale=scale, enable_gqa=True))
    return torch.cat([each[0].transpose(0, 1) for each in out])


@pytest.fixture
def varlen(monkeypatch):
    """Attention as on a GPU: all sequences of a packed row in one call."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return in_turn(*args, **kwargs)

    monkeypatch.setattr(shared_prefix, "VARLEN", {"cpu": (counted, {torch.float32})})
    monkeypatch.setattr(shared_prefix, "CHECKED", set())
    return calls


@pytest.mark.parametrize(
    "settings",
    [{}, {"beta": 0.1, "loss_type": "grpo"}, {"activation_checkpointing": True}, {"per_device_train_batch_size": 2}],
)
def test_the_loss_is_that_of_trl_with_all_sequences_in_one_call(tiny, tmp_path, monkeypatch, varlen, settings):
    sizes = {"per_device_train_batch_size": 8} | settings
    assert_equal(
        tiny, tmp_path, monkeypatch, **sizes | {"gradient_accumulation_steps": 16 // sizes["per_device_train_batch_size"]}
    )
    assert len(varlen) > 4


def test_rollouts_are_those_of_trl_with_all_prompts_in_one_call(tiny, tmp_path, varlen):
    expected = rollouts(GRPOTrainer, tiny, tmp_path)
    assert varlen == []
    assert rollouts(SharedPrefixGRPOTrainer, tiny, tmp_path) == expected
    assert len(varlen) == 2 + 1  # a call for each layer, and the comparison


@pytest.mark.parametrize("how", ["it fails", "it computes something else"])
def test_a_kernel_that_does_not_work_is_not_used(tiny, tmp_path, monkeypatch, varlen, caplog, how):
    logging.disable(logging.NOTSET)

    def broken(query, *args, **kwargs):
        if how == "it fails":
            raise RuntimeError("no kernel for this head size")
        return in_turn(query, *args, **kwargs) * 1.1

    shared_prefix.VARLEN["cpu"] = (broken, {torch.float32})
    assert rollouts(SharedPrefixGRPOTrainer, tiny, tmp_path) == rollouts(GRPOTrainer, tiny, tmp_path)
    assert shared_prefix.VARLEN == {}
    assert ("no kernel for this head size" if how == "it fails" else "its output differs by") in caplog.text
    assert caplog.text.count("group by group") == 1


def test_micro_batches_hold_whole_groups_in_random_order(tiny, tmp_path):
    trainer, _ = build(SharedPrefixGRPOTrainer, tiny, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    orders = set()
    for _ in range(6):
        trainer.model.train()
        trainer._prepare_inputs([{"prompt": row["prompt"]} for row in trainer.train_dataset for _ in range(GENERATIONS)])
        groups = [batch["prompt_ids"].unique(dim=0).tolist() for batch in trainer._buffered_inputs]
        assert all(len(group) == 1 for group in groups)
        orders.add(str(groups))
        assert len({str(group) for group in groups}) == len(PROMPTS)
    assert len(orders) > 1


def rollouts(cls, folder, output, **settings):
    trainer, _ = build(cls, folder, output, top_k=1, max_completion_length=40, **settings)
    # Many tokens end a completion, so that completions end at different times.
    trainer.generation_config.eos_token_id = trainer.eos_token_ids = [END, *range(20, 24)]
    tokenize = trainer.processing_class.apply_chat_template
    prompts = [tokenize([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
               for text in [*PROMPTS, *"bcdefgh"] for _ in range(2)]  # fmt: skip
    before = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    found, _ = trainer._generate_single_turn(prompts, None, {}, 2)
    assert all(torch.equal(before[name], each) for name, each in trainer.model.state_dict().items())
    return found


def repeated(step, state, output):
    """Stands for a CUDA graph where there is no GPU: a function that does the step again, in the same tensors."""
    places = [each.data_ptr() for each in (*state, output)]

    def again():
        step()
        assert [each.data_ptr() for each in (*state, output)] == places

    return again


@pytest.fixture
def graphs(monkeypatch):
    """Sample as on a GPU, in windows of seven tokens."""
    monkeypatch.setitem(shared_prefix_sampling.GRAPHS, "cpu", repeated)
    monkeypatch.setattr(shared_prefix_sampling, "WINDOW", 7)
    monkeypatch.setattr(shared_prefix_sampling, "LOOK", 3)


SETTINGS = [{}, {"repetition_penalty": 1.3}, {"temperature": 0.7, "top_p": 0.9}, {"lora": {"use_dora": True}}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_greedy_rollouts_are_those_of_trl(tiny, tmp_path, settings):
    expected = rollouts(GRPOTrainer, tiny, tmp_path, **settings)
    assert rollouts(SharedPrefixGRPOTrainer, tiny, tmp_path, **settings) == expected
    assert len({len(ids) for ids in expected}) > 3  # rows did leave


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_so_are_those_from_fixed_buffers(tiny, tmp_path, settings, graphs):
    repeats = []
    once = shared_prefix_sampling.Decoder.repeat

    def counted(decoder):
        repeats.append(len(decoder.rows))
        return once(decoder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefix_sampling.Decoder, "repeat", counted)
        found = rollouts(SharedPrefixGRPOTrainer, tiny, tmp_path, **settings)
    assert found == rollouts(GRPOTrainer, tiny, tmp_path, **settings)
    if "repetition_penalty" in settings:  # which looks at all tokens so far
        assert repeats == []
    else:
        assert len(repeats) >= 3  # windows
        assert len(set(repeats)) > 1  # rows left


def test_a_rollout_ends_at_its_limit_and_soon_after_the_last_completion(tiny, tmp_path, graphs):
    for limit in (1, 2, 7, 8, 15):
        trainer, _ = build(SharedPrefixGRPOTrainer, tiny, tmp_path, max_completion_length=limit)
        trainer.generation_config.eos_token_id = trainer.eos_token_ids = [104]
        ids, _ = trainer._generate_single_turn([[5, 6]] * 4, None, {}, 4)
        assert {len(each) for each in ids} == {limit}
    trainer, _ = build(SharedPrefixGRPOTrainer, tiny, tmp_path, max_completion_length=400)
    trainer.generation_config.eos_token_id = trainer.eos_token_ids = list(range(105))
    ids, _ = trainer._generate_single_turn([[5, 6]] * 4, None, {}, 4)
    assert {len(each) for each in ids} == {1}


def test_training_leaves_the_base_weights_bit_for_bit(tiny, tmp_path):
    trainer, steps = build(SharedPrefixGRPOTrainer, tiny, tmp_path, bf16=True, max_steps=3, beta=0.1)

    def base():
        return {name: each.clone() for name, each in trainer.model.named_parameters() if "lora" not in name}

    before = base()
    trainer.train()
    assert len(steps) == 3
    assert all(torch.equal(before[name], each) for name, each in base().items())


def test_an_error_in_a_rollout_leaves_the_weights_too(tiny, tmp_path, monkeypatch):
    trainer, _ = build(SharedPrefixGRPOTrainer, tiny, tmp_path, bf16=True)
    before = {name: each.clone() for name, each in trainer.model.named_parameters()}
    monkeypatch.setattr(shared_prefix_sampling, "backbone", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer._generate_single_turn([[5, 6]], None, {}, 1)
    assert all(torch.equal(before[name], each) for name, each in trainer.model.named_parameters())


def test_sampling_follows_the_model(tiny, tmp_path):
    """The first token's frequencies over many completions are its probabilities."""
    trainer, _ = build(SharedPrefixGRPOTrainer, tiny, tmp_path, max_completion_length=1)
    prompt, rows = [10, 11, 12, 13], 4000
    torch.manual_seed(0)
    found, _ = trainer._generate_single_turn([prompt] * rows, None, {}, rows)
    frequencies = torch.bincount(torch.tensor(found)[:, 0], minlength=105) / rows
    with torch.no_grad():
        probabilities = trainer.model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert (frequencies - probabilities).abs().max() < 0.03


@pytest.mark.parametrize("vocabulary", [5, 128, 300, 1024])
def test_a_draw_has_the_probabilities_and_never_an_excluded_token(vocabulary):
    torch.manual_seed(0)
    scores = torch.randn(vocabulary) * 2
    scores[torch.randperm(vocabulary)[: vocabulary // 2]] = -torch.inf
    scores[-1] = -torch.inf
    expected = scores.softmax(-1)
    drawn = shared_prefix_sampling.draw(scores.expand(60_000, -1))[0]
    found = torch.bincount(drawn, minlength=vocabulary) / len(drawn)
    assert found.shape == expected.shape
    assert (found[expected == 0] == 0).all()
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / len(drawn)).sqrt() + 1e-9).all()


def test_a_draw_from_one_possible_token_takes_it():
    for token in (0, 127, 128, 299):
        scores = torch.full((50, 300), -torch.inf)
        scores[:, token] = 3.0
        assert shared_prefix_sampling.draw(scores)[0].unique().tolist() == [token]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MistralConfig(sliding_window=8, **SMALL), "sliding"),
        (Qwen3Config(layer_types=["sliding_attention", "full_attention"], **SMALL), "sliding_attention"),
        (LlamaConfig(attention_dropout=0.1, **SMALL), "dropout"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_model_it_cannot_take_is_named_with_the_reason(tmp_path, config, said):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    reason = unsupported(model, GRPOConfig(output_dir=str(tmp_path), use_cpu=True), LoraConfig(**LORA))
    assert said in (reason or "")


def test_it_refuses_to_train_more_than_lora(tiny, tmp_path):
    with pytest.raises(ValueError, match="LoRA is not all that is trained"):
        build(SharedPrefixGRPOTrainer, tiny, tmp_path, lora={"modules_to_save": ["lm_head"]})


@pytest.mark.parametrize(
    ("lora", "said"), [({}, "shared prefix"), ({"modules_to_save": ["lm_head"]}, "stock TRL: LoRA is not all")]
)
def test_the_training_job_takes_it_where_it_can(job, monkeypatch, lora, said):
    said_lines = []
    monkeypatch.setattr(training_job.log, "info", lambda text, *args: said_lines.append(text % args if args else text))
    job.config(grpo={"max_steps": 1}, lora={"r": 4, **lora})
    job.rows()
    training_job.train(training_job.parse_flags([]))
    assert any(line.startswith(f"trainer={said}") for line in said_lines)
    assert len(job.metrics()) == 1


@pytest.mark.soak
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_so_with_smollm2(tmp_path, monkeypatch, beta):
    assert_equal(fetch(MODELS), tmp_path, monkeypatch, max_steps=1, beta=beta, learning_rate=1e-3)


@pytest.mark.soak
def test_greedy_rollouts_of_smollm2_are_those_of_trl(tmp_path):
    found = [rollouts(cls, fetch(MODELS), tmp_path, perturb=False) for cls in (GRPOTrainer, SharedPrefixGRPOTrainer)]
    assert found[0] == found[1]
