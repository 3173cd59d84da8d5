"""Other frameworks' names of settings, and where each setting stands in a run config.

Validation names the place of a pasted key, and `tunedrop config --from` moves whole configs by the same table.
"""

from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

from pydantic import BaseModel

from tunedrop.config.fields import MANAGED_GRPO, MANAGED_LORA, config_fields
from tunedrop.config.model import Compute, Gate, RunConfig

# Each line: a key of a run config, then its names elsewhere. A dotted name is a path of sections. The flat names of TRL's
# and PEFT's fields are not listed: `_places` has them, too.
_NAMES = {
    "TRL": """
        model                               model_name_or_path model_id base_model_name_or_path
        system_prompt                       system_prompt
        rewards                             reward_funcs reward_functions reward_func
        lora.r                              lora_r lora_rank
        lora.target_modules                 lora_target_modules
        lora.modules_to_save                lora_modules_to_save
        lora.load_in_4bit                   load_in_4bit use_4bit
        grpo.warmup_steps                   warmup_ratio
        grpo.max_completion_length          max_new_tokens max_response_length
        grpo.beta                           kl_coef kl_coeff kl_loss_coef
        grpo.num_generations                num_samples group_size
        grpo.learning_rate                  lr
        heldout_fraction                    test_split_ratio
    """,
    "PEFT": """
        lora.r                              lora.rank lora.lora_r
        lora.lora_alpha                     lora.alpha
        lora.lora_dropout                   lora.dropout
    """,
    "Axolotl": """
        model                               base_model
        lora.target_modules                 lora_target_linear
        lora.use_dora                       peft_use_dora
        lora.use_rslora                     peft_use_rslora
        lora.layers_to_transform            peft_layers_to_transform
        grpo.per_device_train_batch_size    micro_batch_size
        grpo.num_train_epochs               num_epochs
        grpo.optim                          optimizer
        grpo.lr_scheduler_type              lr_scheduler
        grpo.save_total_limit               save_total_limit
        grpo.neftune_noise_alpha            noisy_embedding_alpha
        max_seq_length                      sequence_len
        heldout_fraction                    val_set_size
    """,
    "verl": """
        model                               actor_rollout_ref.model.path
        lora.r                              actor_rollout_ref.model.lora_rank
        lora.lora_alpha                     actor_rollout_ref.model.lora_alpha
        lora.target_modules                 actor_rollout_ref.model.target_modules
        lora.exclude_modules                actor_rollout_ref.model.exclude_modules
        grpo.gradient_checkpointing         actor_rollout_ref.model.enable_gradient_checkpointing
        grpo.learning_rate                  actor_rollout_ref.actor.optim.lr
        grpo.weight_decay                   actor_rollout_ref.actor.optim.weight_decay
        grpo.warmup_steps                   actor_rollout_ref.actor.optim.lr_warmup_steps_ratio
        grpo.warmup_steps                   actor_rollout_ref.actor.optim.lr_warmup_steps
        grpo.per_device_train_batch_size    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu
        grpo.gradient_accumulation_steps    actor_rollout_ref.actor.ppo_mini_batch_size
        grpo.num_iterations                 actor_rollout_ref.actor.ppo_epochs
        grpo.max_grad_norm                  actor_rollout_ref.actor.grad_clip
        grpo.epsilon                        actor_rollout_ref.actor.clip_ratio actor_rollout_ref.actor.clip_ratio_low
        grpo.epsilon_high                   actor_rollout_ref.actor.clip_ratio_high
        grpo.entropy_coef                   actor_rollout_ref.actor.entropy_coeff
        grpo.beta                           actor_rollout_ref.actor.kl_loss_coef
        grpo.num_generations                actor_rollout_ref.rollout.n
        grpo.temperature                    actor_rollout_ref.rollout.temperature
        grpo.top_p                          actor_rollout_ref.rollout.top_p
        grpo.top_k                          actor_rollout_ref.rollout.top_k
        grpo.generation_batch_size          data.train_batch_size
        grpo.max_completion_length          data.max_response_length
        grpo.seed                           data.seed
        grpo.num_train_epochs               trainer.total_epochs
        grpo.max_steps                      trainer.total_training_steps
        grpo.save_steps                     trainer.save_freq
        max_prompt_length                   data.max_prompt_length
        prompt_overflow                     data.truncation
        compute.instance_count              trainer.nnodes
    """,
    "ms-swift": """
        system_prompt                       system
        max_prompt_length                   max_length
        heldout_fraction                    split_dataset_ratio
        lora.load_in_4bit                   quant_bits
    """,
    "Unsloth": """
        model                               model_name
        grpo.seed                           random_state
        grpo.optim                          optim_type
    """,
    "SageMaker": """
        model                               model_name model_path base_model_id
        grpo.num_train_epochs               epoch epochs n_epochs epochCount epoch_count
        grpo.learning_rate                  learningRate learning_rate
        grpo.per_device_train_batch_size    batch_size train_batch_size batchSize per_gpu_batch_size
        grpo.generation_batch_size          global_batch_size
        grpo.num_generations                trainingSamplePerPrompt training_sample_per_prompt number_generation
        grpo.max_completion_length          inferenceMaxTokens inference_max_tokens max_output_length
        grpo.max_steps                      max_train_steps
        lora.lora_alpha                     alpha
        max_prompt_length                   max_input_length maxPromptLength
        heldout_fraction                    validation_split_ratio
        compute.instance_type               instanceType InstanceType
        compute.instance_count              instanceCount InstanceCount num_instances
        compute.max_runtime                 max_run MaxRuntimeInSeconds
        compute.spot                        use_spot_instances EnableManagedSpotTraining
        compute.volume_size_gb              volume_size VolumeSizeInGB
        compute.keep_alive                  keep_alive_period_in_seconds KeepAlivePeriodInSeconds
    """,
}
# Settings without a place in a run config: the reason, and their names, where * stands for any text.
_LEFT_OUT = {
    "each entry of rewards has a weight of its own": "reward_weights",
    "TRL computes GRPO's loss and its KL term in a way of its own; see grpo.loss_type": """
        actor_rollout_ref.actor.kl_loss_type actor_rollout_ref.actor.loss_agg_mode actor_rollout_ref.actor.policy_loss*
    """,
    "the dataset is the file that you drop": """
        dataset dataset_* datasets* data.train_files data.val_files train_file train_data* val_dataset test_datasets
        train_dataset eval_dataset data_path cached_dataset pretraining_dataset test_size
        data.prompt_key data.reward_fn_key data.shuffle data.filter_overlong_prompts* columns_mapping data.custom_cls*
        max_samples max_train_samples max_eval_samples data.return_raw_chat data.*max_samples skip_prepare_dataset
        shuffle_merged_datasets streaming interleave_prob
    """,
    "every run trains a LoRA adapter with GRPO": """
        adapter rl rlhf_type use_peft tuner_type train_type sft_type algorithm.adv_estimator peft_type method
        training_type full_finetuning finetuning_type instruction_tuned chat_dataset algorithm.use_kl_in_reward
        rl_algorithm customization_technique
    """,
    "the jobs' image has no vLLM: the trainer samples": """
        vllm* use_vllm* trl.vllm* trl.use_vllm fast_inference gpu_memory_utilization max_lora_rank sleep_level
        actor_rollout_ref.rollout.* async_generate offload_model offload_optimizer max_model_len
    """,
    "the jobs have no DeepSpeed: LoRA trains data-parallel": "deepspeed* zero_stage zero3*",
    "a job decides how it loads and stores the weights": """
        dtype torch_dtype model_dtype attn_implementation attn_impl flash_attention* flash_attn* sdp_attention
        xformers_attention trust_remote_code model_revision model_init_kwargs load_in_8bit int8_quantization bnb_*
        use_bnb_nested_quant unsloth* lora_mlp_kernel lora_qkv_kernel lora_o_kernel model_type tokenizer_* strict
        tokenizer use_fast_tokenizer special_tokens* use_gradient_checkpointing quant_method use_reentrant
        actor_rollout_ref.model.* gradient_checkpointing_kwargs* is_* device_map merge_lora use_unsloth
        precision mixed_precision bf16.* float16 bfloat16 gpu_* tensor_parallel*
    """,
    "a job decides how it uses its GPUs; compute has the instances": """
        actor_rollout_ref.actor.* actor_rollout_ref.ref.* actor_rollout_ref.hybrid_engine enable_fsdp num_processes
        num_machines trainer.n_gpus_per_node dist_* ddp* context_parallel* sample_packing* pad_to_sequence_len
        eval_sample_packing trainer.ray* ray_* n_gpus nproc_per_node CUDA_VISIBLE_DEVICES trainer.device* main_process_port
        liger_* use_liger* plugins cut_cross_entropy
    """,
    "Tunedrop has no value model and no reward model; rewards.md lists its rewards": """
        critic* reward_model* algorithm.* trainer.critic_warmup reward.* reward_manager* reward_kwargs*
    """,
    "Tunedrop writes logs and metrics itself": """
        wandb* report_to trainer.logger trainer.project_name trainer.experiment_name run_name logging_dir mlflow* swanlab*
        trackio* comet* trainer.val* trainer.log* use_wandb use_tensorboard tensorboard* experiment_name project_name
        task_name log_completions_hub_repo num_completions_to_print trainer.rollout_data_dir
    """,
    "a launch plan has SageMaker's own settings": "sagemaker_* hyperparameter_tuning*",
    "Tunedrop decides where a job reads and writes": """
        output_dir output overwrite_output_dir dataset_prepared_path resume_from_checkpoint trainer.default_* hub*
        push_to_hub* trainer.resume* local_rank save_safetensors create_checkpoint_symlink add_version model_output* ckpt*
        auto_resume* trainer.*dir lora_model_dir adapters* ignore_data_skip model_output_path
    """,
    "a run has no evaluation during training: the inference tests run after it": """
        eval* per_device_eval_batch_size do_eval do_predict trainer.test_freq evals_per_epoch val_batch_size
        validation_split* load_best_model_at_end early_stopping* metric_for_best_model greater_is_better data.val_*
    """,
    "GRPO trains on the completions; the model's own chat template makes the prompts": """
        train_on_inputs chat_template* template group_by_length data_collator* completion_only_loss max_grad_value
        label_* roles_to_train train_on_eos dataset_num_proc preprocessing_num_workers loss_scale packing
        remove_unused_columns train_data_split_seed
    """,
    "a file with a reward of your own: put it beside the dataset, and write {type: python, file: …, function: …}": """
        custom_reward_function* external_plugins reward_func_path trl.rollout_func reward_server*
    """,
}
# The sections of a run config: a section is no setting.
_SECTIONS = frozenset("columns lora grpo compute gate preflight learnability alerts notify".split())
# Sections in which frameworks and scripts keep fields of TRL and PEFT under their own names.
_PASSED_THROUGH = ("trl.", "grpo.", "lora.", "peft.", "lora_config.", "peft_config.", "grpo_config.", "training_args.")


class Place(NamedTuple):
    """Where a setting of another framework stands: a dotted key of a run config, or the reason why it has none."""

    key: str | None
    reason: str = ""


def place_of(name: str) -> Place | None:
    """Return the place of a setting by its name in another framework, or None for an unknown name.

    A path of sections is dotted. `--learning-rate` is `learning_rate`.
    """
    name = name.lstrip("-").replace("-", "_")
    inner = next((name.removeprefix(section) for section in _PASSED_THROUGH if name.startswith(section)), name)
    for each in (name, inner):
        if each not in _listed() and (reason := _reason(each)):
            return Place(None, reason)
        if key := _places().get(each):
            return Place(key)
    return None


def is_section(name: str) -> bool:
    """Whether other frameworks have settings with a place below this dotted name."""
    return any(each.startswith(f"{name}.") for each in _listed())


@cache
def _listed() -> dict[str, str]:
    """Return the dotted key of each name that `_NAMES` lists."""
    lines = (line.split() for names in _NAMES.values() for line in names.splitlines() if line.strip())
    return {name: key for key, *names in lines for name in names}


@cache
def _places() -> dict[str, str]:
    """Return the dotted key of every other name: the listed ones, and TRL's, PEFT's and our own keys without a section."""
    sections: dict[str, type[BaseModel]] = {"compute": Compute, "gate": Gate}
    names = {name: f"{section}.{name}" for section, model in sections.items() for name in model.model_fields}
    for section, managed in (("lora", MANAGED_LORA), ("grpo", MANAGED_GRPO)):
        names |= {name: f"{section}.{name}" for name in config_fields()[section].keys() - managed}
    top = {name: name for name in RunConfig.model_fields.keys() - _SECTIONS}
    return names | top | _listed()


def _reason(name: str) -> str | None:
    """Return why a name has no place."""
    reasons = (why for why, names in _LEFT_OUT.items() if any(fnmatchcase(name, each) for each in names.split()))
    return next(reasons, "Tunedrop sets it" if name in MANAGED_GRPO | MANAGED_LORA else None)
