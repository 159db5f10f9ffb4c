"""The options of TRL 1.16 (and of the transformers beneath it, and their older spellings) that need no thought.

What is not here is either an option of ours by the same name, or has a rule in `model.py`, `data.py`, `training.py`,
`times.py`, `losses.py` or `rollouts.py`. Where ours gets an option of a name that stands here, its entry is void.
"""

from __future__ import annotations

from typing import Any, NamedTuple

RENAMED = {
    "max_seq_length": "max_length",
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "dataset_streaming": "streaming",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "no_cuda": "use_cpu",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "reward_model_path": "reward_model_name_or_path",
    "use_transformers_paged": "use_transformers_continuous_batching",
    "wandb_log_unique_prompts": "log_unique_prompts",
    "group_by_length": "train_sampling_strategy",
    "tokenizer_name": "tokenizer",
    "tokenizer_name_or_path": "tokenizer",
    "processing_class": "tokenizer",
    "revision": "model_revision",
    "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
    "use_liger": "use_liger_kernel",
    "use_num_logits_to_keep": "use_logits_to_keep",
    "vllm_max_model_len": "vllm_max_model_length",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
    "preprocessing_num_workers": "dataset_num_proc",
}
"""An older or another spelling -> today's, which is judged in its place."""

WITHOUT_EFFECT = {
    "every step is a line of metrics.jsonl, and is shown": (
        "logging_steps logging_strategy logging_first_step logging_dir logging_nan_inf_filter log_level "
        "log_level_replica log_on_each_node disable_tqdm include_num_input_tokens_seen include_tokens_per_second "
        "skip_memory_metrics include_inputs_for_metrics include_for_metrics"
    ),
    "trackers (report_to) know a run by its output_dir, in the project logratio": (
        "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "completions are kept in completions.parquet, and two of them shown every log_completions_steps": (
        "num_completions_to_print log_unique_prompts log_multimodal log_completions_hub_repo"
    ),
    "what push_to_hub asks for is pushed once, at the end, without checkpoints": "hub_strategy hub_always_push",
    "rows come from a memory-mapped table, or are read as they are needed, without workers": (
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order"
    ),
    "the last step of an epoch holds what is left, few as it may be": "dataloader_drop_last",
    "rows are dealt to the processes by their tokens": "accelerator_config dispatch_batches split_batches",
    "columns that nothing reads are left alone": "remove_unused_columns label_names length_column_name",
    "rows are packed by micro_batch_tokens in any case, each seeing itself alone; batch_size counts rows, not packed "
    "blocks as TRL's does": "packing packing_strategy eval_packing",
    "micro-batches are packed by micro_batch_tokens, with little padding": (
        "padding_free pad_to_multiple_of padding_value label_pad_token_id pad_token use_logits_to_keep"
    ),
    "it would change memory and speed alone: micro_batch_tokens sets both": (
        "per_device_eval_batch_size precompute_ref_batch_size eval_accumulation_steps auto_find_batch_size "
        "torch_empty_cache_steps activation_offloading dataset_batch_size eval_do_concat_batches batch_eval_metrics "
        "eval_use_gather_object prediction_loss_only"
    ),
    "the losses are one kernel with the LM head in any case, never through logits": "use_liger_loss",
    "nothing here is compiled by torch.compile: a question of speed": (
        "torch_compile torch_compile_backend torch_compile_mode torchdynamo use_ipex jit_mode_eval"
    ),
    "torch's own setting stands: float32 is multiplied as float32, not as TF32": "tf32",
    "autocast is accelerate's": "fp16_backend half_precision_backend fp16_opt_level",
    "an evaluation is computed as training is": "bf16_full_eval fp16_full_eval",
    "`logratio train` trains, and evaluates where it is told what on": "do_train do_eval do_predict",
    "a loss is divided by the totals of the step over all processes": "average_tokens_across_devices",
    "set by the launcher and accelerate, with the same result": (
        "ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph local_rank "
        "ds3_gather_for_generation tpu_num_cores ignore_bias_buffers use_mps_device device_map"
    ),
    "a checkpoint holds all that a run needs to go on, in safetensors, once": (
        "save_only_model save_on_each_node save_safetensors enable_jit_checkpoint "
        "restore_callback_states_from_checkpoint"
    ),
    "the key-value cache serves generation alone, which has it": "use_cache cache_implementation",
    "a vLLM server is started by itself, with options of its own (docs/rollouts.md has them)": (
        "vllm_model_impl vllm_enable_sleep_mode vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length "
        "vllm_tensor_parallel_size vllm_device vllm_dtype vllm_enable_prefix_caching"
    ),
    "sampling is batched by our own loop: a question of speed": (
        "use_transformers_continuous_batching transformers_continuous_batching_config"
    ),
    "read only with use_adaptive_entropy, which there is not": (
        "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target"
    ),
    "prompts are not cut by themselves, nor in TRL 1.16: prompt and completion together are cut at max_length; a GRPO "
    "prompt of max_length tokens is left out and counted": "max_prompt_length",
    "completions are not cut by themselves: prompt and completion together are cut at max_length": (
        "max_completion_length"
    ),
    "transformers' own code is used; a model that needs another is refused when it is read": "trust_remote_code",
    "model files are read straight to the device": "low_cpu_mem_usage",
    "quantized weights are kept in bytes": "bnb_4bit_quant_storage",
}
"""Why nothing here depends on them -> the options."""


class Only(NamedTuple):
    """values: what happens anyway, whose options say nothing. instead: why another is refused, and what to do."""

    values: tuple[Any, ...]
    instead: str


NOTHING = (None, False, "", 0, (), "none", "no")
MIXED = "list them as datasets, each with path, name and split, as TRL has it"
ONLY = {
    # model
    "lora_task_type": Only(("CAUSAL_LM",), "adapters are those of a causal language model; leave it out"),
    "lora_target_parameters": Only(NOTHING, "adapters go on modules; name them in lora_target_modules"),
    "quantization_config": Only(
        NOTHING,
        "say load_in_4bit: true for nf4 with double quantization, or load_in_8bit: true; a trainer takes "
        "quantization_config=",
    ),
    "use_flash_attention_2": Only(NOTHING, "say attn_implementation: flash_attention_2"),
    "ref_model_init_kwargs": Only(
        (*NOTHING, {}), "the reference is loaded as the model is; a trainer takes a model as ref_model="
    ),
    "use_kernels": Only(NOTHING, "our own kernels are on (fused_layers), or Liger's: use_liger_kernel: true"),
    "liger_kernel_config": Only(NOTHING, "use_liger_kernel patches RMSNorm, SwiGLU and RoPE; leave this out"),
    "cast_lm_head_to_fp32": Only(NOTHING, "say dtype: float32 with bf16: true for weights in float32"),
    "router_aux_loss_coef": Only(NOTHING, "no router loss is added to ours; leave it out to train without"),
    "model_adapter_name": Only(NOTHING, "the adapter that is trained is adapter_name_or_path's"),
    "ref_adapter_name": Only(NOTHING, "the reference is a frozen copy of adapter_name_or_path's adapter"),
    # data
    "dataset_kwargs": Only((*NOTHING, {}), "rows are always prepared, with the tokenizer's special tokens"),
    "truncation_mode": Only(("keep_start",), "what is longer than max_length is cut at its end; leave it out"),
    "chat_template": Only(
        NOTHING, "write it into a file and say chat_template_path: FILE.jinja; a trainer takes processing_class="
    ),
    "eos_token": Only(NOTHING, "set it in the folder of the tokenizer; a trainer takes processing_class="),
    "dataset_mixer": Only(NOTHING, MIXED),
    "dataset_mixture": Only(NOTHING, MIXED),
    "dataset_splits": Only(NOTHING, "say dataset_train_split, and dataset_test_split with eval_strategy"),
    "is_encoder_decoder": Only(NOTHING, "only decoder-only models are trained"),
    "data_dir": Only(NOTHING, "name the folder as dataset_name"),
    # training
    "label_smoothing_factor": Only(NOTHING, "the labels of tokens are not smoothed; leave it out"),
    "neftune_noise_alpha": Only(NOTHING, "no noise is added to embeddings; leave it out"),
    "optim_args": Only(NOTHING, "AdamW's numbers are adam_beta1, adam_beta2 and adam_epsilon"),
    "optim_target_modules": Only(NOTHING, "every trained weight has the one optimizer; leave it out"),
    "full_determinism": Only(NOTHING, "to the bit the same on a CPU alone; leave it out on a GPU"),
    "ignore_data_skip": Only(NOTHING, "a run goes on where it was in its data; leave it out"),
    "eval_delay": Only(NOTHING, "evaluations begin with the first of eval_steps; leave it out"),
    "deepspeed": Only(NOTHING, "shard with FSDP2: accelerate launch --config_file configs/accelerate/fsdp2.yaml"),
    "fsdp": Only((*NOTHING, []), "say it to the launcher: configs/accelerate/fsdp2.yaml"),
    "fsdp_config": Only((*NOTHING, {}), "say it to the launcher: configs/accelerate/fsdp2.yaml"),
    "parallelism_config": Only((*NOTHING, {}), "shard with FSDP2: configs/accelerate/fsdp2.yaml"),
    "debug": Only((*NOTHING, []), "leave it out; an error of one process ends all and is named"),
    "hub_revision": Only((*NOTHING, "main"), "the main branch is pushed to; leave it out"),
    "push_to_hub_organization": Only(NOTHING, "write it in front of the name: hub_model_id: ORGANIZATION/NAME"),
    # losses
    "force_use_ref_model": Only(NOTHING, "name the reference: ref_model_name_or_path"),
    "generate_during_eval": Only(NOTHING, "evaluations have no samples; leave it out"),
    # rollouts
    "vllm_structured_outputs_regex": Only(NOTHING, "completions are not held to a pattern; reward it instead"),
    "generation_kwargs": Only(
        (*NOTHING, {}),
        "sampling has temperature, top_p, top_k, min_p, repetition_penalty, stop_strings and max_completion_length",
    ),
    "reward_clip_range": Only(NOTHING, "clip in the reward function itself"),
    "use_adaptive_entropy": Only(NOTHING, "the entropy bonus has a fixed weight: entropy_coef"),
    "max_tool_calling_iterations": Only(NOTHING, "a rollout_func of yours calls tools, as often as it likes"),
}
"""Options that are accepted at what happens anyway."""

OURS = frozenset(
    "batch_size micro_batch_tokens mixed_precision shuffle eval_size on_bad_row streaming_buffer "
    "dataset_weights fused_lora fused_layers adapter_name_or_path ref_model_name_or_path early_stopping_patience "
    "z_loss_coef asft_alpha gkd_beta gkd_temperature "
    "irpo_alpha dpop_lambda cal_dpo_coef r_dpo_alpha chi_po_r_max rainbow_mu rainbow_gamma beta_dpo_coef "
    "beta_dpo_momentum advantage_type reward_kl_coef reward_kl_estimator teacher_coef reward_timeout kl_estimator "
    "log_completions_steps sampling_correction sampling_clip_min sampling_clip_max stop_strings rollout_engine "
    "dynamic_sampling rollout_func max_staleness".split()
)
"""Options that TRL has not: a file with one of them is ours, and what TRL has too is meant as here."""
