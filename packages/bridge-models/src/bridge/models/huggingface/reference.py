"""Compute the logits of transformers for a folder: run as a program, since importing transformers takes seconds."""

from __future__ import annotations

import sys

import torch


def compute_logits(folder: str, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of the model of a folder, in fp32 on the CPU, [samples, sequence, vocabulary].

    Args:
        folder: A folder with config.json and weights. Nothing is downloaded, and no code of the folder is run.
        tokens: [samples, sequence]; an encoder-decoder gets them on both sides.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    options = {"local_files_only": True, "trust_remote_code": False}
    is_encoder_decoder = AutoConfig.from_pretrained(folder, **options).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, attn_implementation="eager", **options
    ).eval()
    others = {"decoder_input_ids": tokens} if is_encoder_decoder else {"use_cache": False}
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens, **others).logits
    return logits


if __name__ == "__main__":
    _, folder, tokens, logits = sys.argv
    torch.save(compute_logits(folder, torch.load(tokens, weights_only=True)), logits)
