"""LLaMA-Factory's keys without a counterpart here, each with the reason."""

from __future__ import annotations

from sftdist.commands.migrate_peers.rule import differ, leave, skip

OTHERS = (
    skip(
        "tokenised rows are kept in data.store_dir, and made by data.workers processes",
        *("overwrite_cache", "preprocessing_batch_size", "preprocessing_num_workers", "tokenized_path"),
        *("data_shared_file_system", "streaming", "buffer_size", "cache_dir", "disable_shuffling"),
    ),
    skip("what is padded is never trained", "ignore_pad_token_for_loss"),
    skip("every source has its own eval/loss", "eval_on_each_dataset"),
    skip(
        "figures are in metrics.jsonl", "print_param_status", "include_effective_tokens_per_second", "compute_accuracy"
    ),
    skip(
        "decided by the launcher and the machine",
        *("use_fast_tokenizer", "offload_folder", "device_map", "quantization_device_map", "model_max_length"),
        *("compute_dtype", "block_diag_attn", "ray_num_workers", "ray_init_kwargs", "master_addr", "master_port"),
        *("ray_run_name", "ray_storage_path", "ray_storage_filesystem", "resources_per_worker", "placement_strategy"),
    ),
    skip("faster kernels are taken where they are installed: model.kernels=auto", "use_v1_kernels", "use_unsloth"),
    skip("faster kernels are taken where they are installed: model.kernels=auto", "enable_liger_kernel"),
    skip("figures are in metrics.jsonl, for `sftdist compare`", "plot_loss"),
    skip("batches are packs of data.max_len tokens", "sortish_sampler"),
    skip("the kind of four bits is nf4", "quantization_type", "quantization_method"),
    skip("norms and the head are computed in fp32", "upcast_layernorm", "upcast_lmhead_output"),
    skip(
        "of generation and serving: `sftdist evaluate`, and any server reads the export",
        *("infer_backend", "infer_dtype", "use_kv_cache", "vllm_maxlen", "vllm_gpu_util", "vllm_enforce_eager"),
        *("vllm_max_lora_rank", "vllm_config", "sglang_maxlen", "sglang_mem_fraction", "sglang_tp_size"),
        *("sglang_config", "sglang_lora_backend", "do_sample", "temperature", "top_p", "top_k", "num_beams"),
        *("max_new_tokens", "max_length", "repetition_penalty", "length_penalty", "skip_special_tokens"),
        *(
            "eval_num_beams",
            "generation_max_length",
            "generation_num_beams",
            "generation_config",
            "predict_with_generate",
        ),
    ),
    skip(
        "export.* keys and `sftdist export` write the model",
        *("export_dir", "export_size", "export_device", "export_legacy_format", "export_quantization_bit"),
        *("export_quantization_dataset", "export_quantization_nsamples", "export_quantization_maxlen"),
    ),
    skip("no token of a hub is read from a file", "hf_hub_token", "ms_hub_token", "om_hub_token"),
    skip("how a trace is written", "profiler_output_dir", "profiler_wait_steps", "profiler_warmup_steps"),
    skip("how a trace is written", "profiler_active_steps", "profiler_repeat", "profiler_record_shapes"),
    skip("how a trace is written", "profiler_profile_memory", "profiler_with_stack", "profile_modules"),
    differ("`sftdist publish hub=NAME` pushes a release that passed its gate", "export_hub_model_id"),
    leave("a trace of some steps", "enable_torch_profiler"),
    leave("all rows are taken; give a file with fewer", "max_samples"),
    leave("a system turn is part of the conversation", "default_system"),
    leave("the chat template lays tools out", "tool_format"),
    leave("the start is model.path; an adapter as a start has to be merged first", "adapter_name_or_path"),
    leave(
        "the start is model.path; an adapter as a start has to be merged first", "adapter_folder", "create_new_adapter"
    ),
    skip("the vocabulary grows where it has to", "resize_vocab"),
    leave("new rows begin as the mean of the others: model.add_tokens", "new_special_tokens_config"),
    leave("new rows begin as the mean of the others: model.add_tokens", "init_special_tokens"),
    leave("a template's tokens are one id each", "split_special_tokens"),
    leave("the model's own config is taken as it is", "rope_scaling", "moe_aux_loss_coef", "train_from_scratch"),
    leave("a change of the model's layers", "shift_attn", "mixture_of_depths", "use_llama_pro"),
    leave("training stops at train.epochs or train.max_steps; the best checkpoint can be kept", "early_stopping_steps"),
    leave("all weights are trained, or an adapter", "freeze_trainable_layers", "freeze_trainable_modules"),
    leave("all weights are trained, or an adapter", "freeze_extra_modules"),
    leave("one learning rate for all weights", "loraplus_lr_ratio", "loraplus_lr_embedding"),
    leave("a kind of adapter or of its start that is not there", "pissa_init", "pissa_iter", "pissa_convert"),
    leave(
        "a kind of adapter or of its start that is not there",
        "module_dropout",
        "oft_rank",
        "oft_block_size",
        "oft_target",
    ),
    leave(
        "an optimizer of its own",
        *("use_galore", "galore_target", "galore_rank", "galore_update_interval", "galore_scale", "galore_proj_type"),
        *("galore_layerwise", "use_apollo", "apollo_target", "apollo_rank", "apollo_update_interval", "apollo_scale"),
        *("apollo_proj", "apollo_proj_type", "apollo_scale_type", "apollo_layerwise", "apollo_scale_front"),
        *("use_badam", "badam_mode", "badam_start_block", "badam_switch_mode", "badam_switch_interval"),
        *("badam_update_ratio", "badam_mask_mode", "badam_verbose", "use_adam_mini", "use_muon"),
    ),
    leave("another loss than the mean over the trained tokens", "use_dft_loss", "use_asft_loss", "asft_alpha"),
    leave("another loss than the mean over the trained tokens", "use_eaft_loss", "eaft_alpha"),
    leave(
        "training from preferences or rewards; the export of a run goes on in TRL",
        *("pref_beta", "pref_ftx", "pref_bco_weight", "pref_loss", "dpo_label_smoothing", "kto_chosen_weight"),
        *("kto_rejected_weight", "simpo_gamma", "ppo_buffer_size", "ppo_epochs", "ppo_score_norm", "ppo_target"),
        *("ppo_whiten_rewards", "ref_model", "ref_model_adapters", "ref_model_quantization_bit", "reward_model"),
        *("reward_model_adapters", "reward_model_quantization_bit", "reward_model_type", "ld_alpha"),
    ),
    leave("training in eight bits", "fp8", "fp8_backend", "fp8_enable_fsdp_float8_all_gather"),
    leave("another engine than DeepSpeed", "use_mca", "use_hyper_parallel", "hyper_parallel_args", "use_kt"),
    leave("another engine than DeepSpeed", "kt_weight_path", "kt_expert_checkpoint_path", "kt_use_lora_experts"),
    leave("another engine than DeepSpeed", "kt_lora_expert_num", "kt_lora_expert_intermediate_size", "use_ray"),
    skip("a vision tower stays as it is", "freeze_vision_tower", "freeze_multi_modal_projector"),
    leave(
        "images are refused; text fine-tuning keeps a vision tower as it is",
        *("freeze_language_model", "media_dir", "image_max_pixels", "image_min_pixels", "image_do_pan_and_scan"),
        *("crop_to_patches", "video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen"),
        *("use_audio_in_video", "audio_sampling_rate"),
    ),
    leave(
        "another tracker; metrics.jsonl has every figure, and W&B is built in",
        *("use_swanlab", "swanlab_project", "swanlab_workspace", "swanlab_run_name", "swanlab_mode"),
        *("swanlab_api_key", "swanlab_logdir", "swanlab_lark_webhook_url", "swanlab_lark_secret"),
    ),
)
