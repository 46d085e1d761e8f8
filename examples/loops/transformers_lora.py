"""transformers and peft: which of the training texts help? ``python -m examples.loops.transformers_lora``.

The lower variables are LoRA adapters of a causal language model, the upper ones a weight for each training text; a few
trusted texts judge. The model is tiny and randomly initialised, so that nothing is downloaded: put
``AutoModelForCausalLM.from_pretrained(...)`` in its place.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import bilevel

WORDS, LENGTH = 32, 16


def texts(count: int, noise: Tensor) -> Tensor:
    """Texts that count upwards from a random word; where there is noise, at random."""
    start = torch.randint(WORDS, (count, 1))
    counting = (start + torch.arange(LENGTH)) % WORDS
    return torch.where(noise[:, None], torch.randint(WORDS, (count, LENGTH)), counting)


def main(argv: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
    parser = argparse.ArgumentParser(description="LoRA adapters below, data weights above.")
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    noisy = torch.rand(64) < 0.5
    train, trusted = texts(64, noisy), texts(16, torch.zeros(16, dtype=torch.bool))

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation="eager",  # fused attention has no second derivative; a first-order method takes it
    )
    model = LlamaForCausalLM(config)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", modules_to_save=["lm_head"]))
    weights = nn.Parameter(torch.zeros(len(train)))

    def each(tokens: Tensor) -> Tensor:
        """The loss of each text."""
        logits = model(input_ids=tokens[:, :-1]).logits
        return cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    def upper_loss(tokens: Tensor) -> Tensor:
        return each(tokens).mean()

    def lower_loss(number: Tensor) -> Tensor:
        return (weights[number].sigmoid() * each(train[number])).mean()

    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bilevel.Unrolled(
        upper_loss,
        lower_loss,
        upper=weights,
        lower=model,  # its trainable parameters: the adapters
        upper_optimizer=torch.optim.Adam([weights], lr=0.1),
        lower_optimizer=torch.optim.AdamW(adapters, lr=5e-3),
    )
    for step in range(arguments.steps):
        stats = optimizer.step(trusted, torch.randperm(len(train))[:32])
        if step % 50 == 49:
            print(f"step {step + 1}: trusted loss {stats.upper_loss.item():.3f}")
    learned = weights.detach().sigmoid()
    print(f"mean weight of texts that count {learned[~noisy].mean():.2f}, of noise {learned[noisy].mean():.2f}")
    return learned, noisy


if __name__ == "__main__":
    main()
