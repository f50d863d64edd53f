"""Suggestions for unknown options: first by the names that other programs use, then by similar spelling."""

import difflib
from collections.abc import Iterable

MOST_SUGGESTED = 3
"""Largest number of options in a suggestion."""

_NAMES = {
    "optim.lr": "lr learning_rate max_lr base_lr base_learning_rate peak_lr learn_rate",
    "optim.weight_decay": "wd weight_decay adam_weight_decay l2",
    "optim.betas": "beta1 beta2 b1 b2 adam_beta1 adam_beta2 adam_betas",
    "optim.warmup_steps": "warmup lr_warmup lr_warmup_steps warmup_epochs warmup_iters",
    "optim.final_lr": "min_lr lr_min end_lr final_learning_rate",
    "optim.clip": "grad_clip clip_grad clip_grad_norm gradient_clip gradient_clip_val max_grad_norm",
    "optim.ema_decay": "ema ema_rate use_ema",
    "steps": (
        "epochs num_epochs max_epochs epoch n_epochs num_train_epochs iters iterations max_iters niter "
        "max_steps num_steps train_steps max_train_steps total_steps"
    ),
    "batch_size": (
        "b bs batch batchsize train_batch_size global_batch_size micro_batch_size per_device_train_batch_size "
        "eval_batch_size batch_size_per_gpu"
    ),
    "accumulation": "accumulate grad_accum accum_iter accumulate_grad_batches gradient_accumulation_steps",
    "data.kind": "dataset dataset_name dataset_type",
    "data.root": (
        "data_dir dataset_dir data_path dataset_path data_root dataroot datadir train_dir train_data_dir "
        "image_dir images_dir image_folder data train_data folder path"
    ),
    "data.validation_root": "val_dir val_data_dir validation_dir val_root val_path test_dir",
    "data.image_size": "resolution img_size imgsz image_size size imsize input_size crop_size",
    "data.flip": "hflip random_flip horizontal_flip mirror",
    "data.workers": "num_workers n_workers dataloader_num_workers workers loader_workers",
    "bottleneck.codebook_size": "codebook n_embed num_embeddings num_codes vocab_size n_e k",
    "bottleneck.code_dim": "codebook_dim embedding_dim embed_dim e_dim latent_dim z_dim z_channels",
    "bottleneck.beta": "commitment commitment_cost commitment_weight commitment_beta beta",
    "adversarial.lr": "disc_lr d_lr lr_d discriminator_lr",
    "adversarial.weight": "disc_weight gan_weight adv_weight discriminator_weight",
    "adversarial.start": "disc_start gan_start discriminator_start",
    "perceptual.weight": "lpips_weight perceptual_weight lpips",
    "prior.layers": "n_layer n_layers num_layers depth num_hidden_layers",
    "prior.heads": "n_head n_heads num_heads num_attention_heads",
    "prior.width": "n_embd d_model dim hidden_size hidden_dim embed_dim",
    "prior.dropout": "attn_pdrop resid_pdrop dropout_rate",
    "prior.label_dropout": "class_dropout_prob cfg_dropout label_drop uncond_prob",
    "out": "output output_dir outdir out_dir save_dir save_path logdir log_dir results_dir o",
    "log_every": "log_interval logging_steps print_freq log_steps",
    "save_every": "save_interval save_steps checkpointing_steps ckpt_every save_freq checkpoint_every",
    "validate_every": "eval_interval eval_steps val_interval eval_every val_every validation_steps",
    "keep": "checkpoints_total_limit save_total_limit max_checkpoints",
    "resume": "resume_from resume_from_checkpoint resume_path",
    "seed": "manual_seed random_seed global_seed",
    "config": "cfg config_file config_path yaml c",
    "patience": "early_stopping early_stopping_patience early_stop",
    "n": "num_samples n_samples nsamples num_images n_images samples count number num",
    "class": "class_ label labels classes class_id class_label class_labels cls",
    "guidance": "cfg cfg_scale guidance_scale cfg_weight w",
    "temperature": "temp t",
    "top_k": "topk k",
    "top_p": "topp nucleus p",
    "size": "resolution image_size img_size height width",
    "prior": "checkpoint ckpt ckpt_path model model_path weights gpt_ckpt run",
    "tokenizer": "vq_ckpt vae vqgan vqvae stage1 checkpoint ckpt model model_path run",
    "images": "image input inputs img i",
    "reference": "ref real reference_dir fid_stats",
    "presets": "configs preset config",
}
OTHER_NAMES = {option: tuple(names.split()) for option, names in _NAMES.items()}
"""Names that other programs use for our options. If several options fit, the first one that a command has is named."""

_ACCELERATE = {
    "mixed_precision bf16": "fp16 bf16 amp half mixed_precision use_amp dtype precision",
    "num_processes 2": "gpus num_gpus ngpu n_gpu nproc_per_node devices world_size num_processes",
    "dynamo_backend inductor": "compile torch_compile compile_model",
    "cpu": "device cpu no_cuda cuda gpu use_gpu",
}
ACCELERATE_NAMES = {option: tuple(names.split()) for option, names in _ACCELERATE.items()}
"""Names that other programs use for the options of `accelerate launch`, which sets devices and precision."""


def suggest(key: str, known: Iterable[str], typed: bool = False) -> str:
    """Return the end of a message about an unknown key, with the keys that may have been meant; empty if none is near.

    known: all dotted keys of the command. typed: the key was an option on a command line; the result names options.
    """
    known = set(known)
    name = _normalise(key.rsplit(".", 1)[-1])
    found = _find_by_other_name(name, known) or _find_by_last_part(key, name, known)
    if not found:
        for option, names in ACCELERATE_NAMES.items():
            if name in names:
                return f"; that belongs to Accelerate: `accelerate launch --{option} SCRIPT ...`"
        found = _find_by_spelling(key, known) or _find_by_words(name, known)
    if not found:
        return ""
    named = " or ".join(f"{'-' if len(other) == 1 else '--'}{other}" if typed else other for other in found)
    unit = " (a training's length is counted in steps)" if found == ["steps"] and "epoch" in name else ""
    return f"; did you mean {named}?{unit}"


def _normalise(name: str) -> str:
    return name.replace("-", "_").lower()


def _find_by_other_name(name: str, known: set[str]) -> list[str]:
    """Return the key for which other programs use this name."""
    return [key for key, names in OTHER_NAMES.items() if key in known and name in names][:1]


def _find_by_last_part(key: str, name: str, known: set[str]) -> list[str]:
    """Return the keys of this name under other paths, the most similar path first."""
    found = [other for other in known if _normalise(other.rsplit(".", 1)[-1]) == name]
    return sorted(found, key=lambda other: (-_similarity(key, other), other))[:MOST_SUGGESTED]


def _find_by_spelling(key: str, known: set[str]) -> list[str]:
    """Return the key with the most similar spelling; a misspelt last part is likelier than a misspelt path."""
    by_last_part = {other.rsplit(".", 1)[-1]: other for other in sorted(known, reverse=True)}
    return difflib.get_close_matches(key, known, 1, 0.75) or [
        by_last_part[part] for part in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_last_part, 1, 0.7)
    ]


def _find_by_words(name: str, known: set[str]) -> list[str]:
    """Return the keys that share most words with this one, e.g. `accumulation` for `gradient_accumulation`."""
    words = set(name.split("_"))
    shared = {other: words & set(other.rsplit(".", 1)[-1].split("_")) for other in known}
    likeness = {
        other: len(both) / len(words | set(other.rsplit(".", 1)[-1].split("_")))
        for other, both in shared.items()
        if any(len(word) > 2 for word in both)
    }
    best = max(likeness.values(), default=0.0)
    return sorted(other for other, value in likeness.items() if value == best >= 0.5)[:MOST_SUGGESTED]


def _similarity(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
