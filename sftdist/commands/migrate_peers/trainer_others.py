"""Keys of transformers' TrainingArguments without a counterpart here, which TRL and LLaMA-Factory share."""

from __future__ import annotations

from sftdist.commands.migrate_peers.rule import differ, leave, skip

TRAINER_OTHERS = (
    skip("what a job does is its command here", "do_train", "do_eval", "do_predict"),
    skip(
        "every step is written to metrics.jsonl",
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_dir", "log_on_each_node", "log_level"),
        *("log_level_replica", "disable_tqdm", "include_num_input_tokens_seen", "include_tokens_per_second", "debug"),
        "skip_memory_metrics",
    ),
    skip("a step with a loss that is not finite ends the run", "logging_nan_inf_filter"),
    skip(
        "what belongs to a metric of one's own",
        *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        *("include_for_metrics", "include_inputs_for_metrics", "batch_eval_metrics", "label_names"),
    ),
    skip("of when the first evaluation is", "eval_on_start", "eval_delay"),
    skip("evaluation is in the run's precision", "bf16_full_eval", "fp16_full_eval", "half_precision_backend"),
    skip(
        "decided by the launcher and the machine",
        *(
            "local_rank",
            "use_cpu",
            "no_cuda",
            "use_mps_device",
            "tf32",
            "torch_empty_cache_steps",
            "accelerator_config",
        ),
        *(
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
            "ddp_backend",
        ),
        *("ddp_timeout", "save_on_each_node", "jit_mode_eval", "use_ipex", "tpu_num_cores", "low_cpu_mem_usage"),
    ),
    skip(
        "rows are tokenised beforehand and read from data.store_dir; no workers are needed",
        *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
        *("remove_unused_columns", "train_sampling_strategy", "group_by_length", "length_column_name", "split_batches"),
    ),
    skip("batches are packs of data.max_len tokens", "auto_find_batch_size", "per_gpu_train_batch_size"),
    skip(
        "a run goes on from its own last checkpoint by itself, with the optimizer's state and the data's",
        *("resume_from_checkpoint", "overwrite_output_dir", "save_only_model", "save_safetensors", "ignore_data_skip"),
        *("restore_callback_states_from_checkpoint", "enable_jit_checkpoint"),
    ),
    skip("faster kernels are taken where they are installed: model.kernels=auto", "use_liger_kernel"),
    skip("faster kernels are taken where they are installed: model.kernels=auto", "liger_kernel_config"),
    skip("the same seed draws the same rows", "data_seed", "full_determinism"),
    skip("tokens are averaged over all GPUs in any case", "average_tokens_across_devices"),
    skip("nothing is generated while training", "use_cache"),
    differ("`sftdist publish hub=NAME` pushes a release that passed its gate", "push_to_hub", "push_to_hub_model_id"),
    skip(
        "part of push_to_hub",
        *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        *("push_to_hub_token", "push_to_hub_organization"),
    ),
    leave("another loss than the mean over the trained tokens", "label_smoothing_factor"),
    leave("noise on embeddings", "neftune_noise_alpha"),
    leave("a tracker of its own", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "ray_scope"),
    leave("an optimizer of its own", "optim_target_modules"),
    leave("model or sequence parallelism; here data parallelism with ZeRO", "parallelism_config", "mp_parameters"),
    leave("code of a model's folder is not run", "trust_remote_code"),
)
