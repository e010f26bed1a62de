"""The systems in PyTorch: a transformers model (SDPA) under TRL's ORPO loss or Liger's, without transformers' Trainer.

TRL's loss is its own where TRL can be imported: ORPOTrainer's functions, called on a trainer that was never set up,
its metrics and their waits for the device included. Elsewhere it is `trl_loss` below, which a test holds equal. What
surrounds it is what its trainer does by default: fused AdamW, gradients clipped at norm 1, and for bfloat16 autocast
around the model alone, whose outputs become float32 (accelerate). Liger's loss takes the last hidden states instead,
inside the autocast, as its own trainers have it.

`grouped` sorts a step's pairs by their longer sequence before they are cut into micro-batches: what group_by_length
does to batches, at the size of one step.
"""

import contextlib
import os
import pathlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
import transformers
from torch.nn.utils.rnn import pad_sequence  # pyright: ignore[reportMissingImports]
from torch.utils.flop_counter import (  # pyright: ignore[reportMissingImports]
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from benchmarking.pairs import Pair, load
from benchmarking.systems import Result, Settings, System, clock, peak_rss

IGNORED = -100
Batch = dict[str, torch.Tensor]
Loss = Callable[[Any, Batch], torch.Tensor]
Shape = Sequence[int]


def attention_flops(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Returns the FLOPs of attention [batch, heads, tokens, size], where queries may share heads of keys and values."""
    return sdpa_flop_count(q, (*q[:2], *k[2:]), (*q[:2], *v[2:]))


def attention_backward_flops(dout: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Returns the FLOPs of its gradients."""
    return sdpa_backward_flop_count(dout, q, (*q[:2], *k[2:]), (*q[:2], *v[2:]))


# PyTorch's counter knows neither the attention of CPUs nor, in 2.11, shared heads.
KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
ATTENTION = {getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{suffix}"): count for kernel in KERNELS
             for suffix, count in (("", attention_flops), ("_backward", attention_backward_flops))}


class Steps(NamedTuple):
    """What `clock` takes, the FLOPs per pair of the timed steps as PyTorch counts them, and whose loss it is."""

    first: Callable[[], tuple[float, float]]
    step: Callable[[int], int]
    flops: Callable[[], float]
    loss_from: str


def collate(pairs: Sequence[Pair], device: torch.device) -> Batch:
    """Returns what TRL's collator makes of pairs: each side padded on the right to its longest sequence."""
    batch = {}
    for side, name in enumerate(("chosen", "rejected")):
        ids = [torch.from_numpy(pair.sequences[side][0]).long() for pair in pairs]
        labels = [torch.where(torch.arange(len(x)) < pair.sequences[side][1], IGNORED, x)
                  for x, pair in zip(ids, pairs, strict=True)]
        batch[f"{name}_input_ids"] = pad_sequence(ids, batch_first=True)
        batch[f"{name}_attention_mask"] = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
        batch[f"{name}_labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return {name: x.to(device) for name, x in batch.items()}


def concatenate(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns ids, attention mask and labels [2B, T] of a collated batch, chosen above rejected."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    width = computed_width(batch)
    part = lambda name: torch.cat([
        F.pad(x, (0, width - x.shape[1]), value=fill[name])
        for x in (batch[f"chosen_{name}"], batch[f"rejected_{name}"])])
    return part("input_ids"), part("attention_mask"), part("labels")


def computed_width(batch: Batch) -> int:
    return max(batch[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))


def trls_own_loss(beta: float, device: torch.device) -> Loss:
    """Returns the loss as TRL's ORPOTrainer computes it; ImportError where there is no TRL."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer  # pyright: ignore[reportMissingImports]

    trainer = ORPOTrainer.__new__(ORPOTrainer)  # only its functions: no data set, no tokenizer, no Trainer
    trainer.beta = beta
    trainer.padding_value = 0
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
    trainer.accelerator = types.SimpleNamespace(device=device, gather_for_metrics=lambda x: x)  # type: ignore
    return lambda model, batch: trainer.get_batch_loss_metrics(model, batch)[0]  # type: ignore[arg-type]


def trl_loss(beta: float) -> Loss:
    """Returns the loss of TRL 1.16 in its own words, for where TRL can't be imported; its metrics are left out."""
    def loss(model: Any, batch: Batch) -> torch.Tensor:
        ids, mask, labels = concatenate(batch)
        half = len(ids) // 2
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        nll = F.cross_entropy(logits[:half, :-1].contiguous().flatten(0, 1),
                              torch.where(mask == 1, ids, IGNORED)[:half, 1:].flatten(), ignore_index=IGNORED)
        logits, labels = logits[:, :-1], labels[:, 1:]
        chosen_at = torch.where(labels == IGNORED, 0, labels).unsqueeze(-1)
        # A sequence at a time, as TRL does, which saves memory.
        normaliser = torch.stack([torch.logsumexp(sequence, dim=-1) for sequence in logits])
        logps = torch.gather(logits, -1, chosen_at).squeeze(-1) - normaliser
        counts = labels != IGNORED
        chosen, rejected = ((logps * counts).sum(-1) / counts.sum(-1)).split(half)
        log_odds = chosen - rejected - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
        return nll - beta * F.logsigmoid(log_odds).mean()

    return loss


def liger_loss(beta: float, compiled: bool) -> Loss:
    """Returns Liger's loss over the last hidden states; ImportError where there is no Liger."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss  # pyright: ignore[reportMissingImports]

    fused = LigerFusedLinearORPOLoss(ignore_index=IGNORED, beta=beta, compiled=compiled)

    def loss(model: Any, batch: Batch) -> torch.Tensor:
        ids, mask, labels = concatenate(batch)
        hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        targets = torch.where(mask == 1, ids, IGNORED)
        return fused(model.lm_head.weight, hidden[:, :-1], labels[:, 1:], nll_target=targets[:, 1:])[0]

    return loss


def choose_loss(system: System, settings: Settings, device: torch.device) -> tuple[Loss, str]:
    """Returns the system's loss, and whose it is."""
    if system.liger:
        return liger_loss(settings.beta, compiled=device.type == "cuda"), "Liger"
    try:
        return trls_own_loss(settings.beta, device), "TRL"
    except ImportError:
        return trl_loss(settings.beta), "TRL's, written again"


def in_float32(model: Any, autocast: Any) -> Any:
    """Returns the model as accelerate wraps it: inside the autocast, with logits in float32."""
    def forward(*args: Any, **kwargs: Any) -> Any:
        with autocast():
            output = model(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    return forward


def load_model(system: System, settings: Settings, device: torch.device) -> Any:
    """Returns the model with float32 weights, ready to train."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float32, attn_implementation="sdpa")
    model.to(device).train()
    if system.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if system.kernels:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance  # pyright: ignore[reportMissingImports]
        _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False)
    if system.compiled:
        for layer in model.model.layers:  # one program for all; the whole model at once compiles three times as long
            layer.compile(dynamic=True)  # in place; lengths differ from batch to batch
    return model


def make_steps(system: System, settings: Settings, pairs: Sequence[Pair], device: torch.device) -> Steps:
    """Returns the steps over the pairs."""
    model = load_model(system, settings, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    loss_of, whose = choose_loss(system, settings, device)
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16")
    # Liger's loss needs more than the model's outputs, so the autocast goes around all of it.
    called, around = (model, autocast) if system.liger else (in_float32(model, autocast), contextlib.nullcontext)

    def cut(members: Sequence[Pair]) -> list[Sequence[Pair]]:
        if system.grouped:
            members = sorted(members, key=lambda pair: -pair.longest)
        return [members[i:i + settings.micro] for i in range(0, len(members), settings.micro)]

    def backward(part: Sequence[Pair], parts: int) -> torch.Tensor:
        batch = collate(part, device)
        with around():
            loss = loss_of(called, batch) / parts
        loss.backward()
        return loss.detach()

    def take(members: Sequence[Pair]) -> tuple[float, float]:
        parts, total = cut(members), torch.zeros((), device=device)
        for part in parts:
            total += backward(part, len(parts))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item(), norm.item()

    def members(i: int) -> Sequence[Pair]:
        return pairs[i * settings.pairs:(i + 1) * settings.pairs]

    def step(i: int) -> int:
        take(members(i))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return sum(2 * len(part) * width(part) for part in cut(members(i)))

    def count() -> float:
        flops_of = width_flops(lambda pair: backward([pair], 1))
        optimizer.zero_grad()
        parts = [part for i in range(settings.warmup, settings.warmup + settings.steps) for part in cut(members(i))]
        return sum(len(part) * flops_of(width(part)) for part in parts) / (settings.steps * settings.pairs)

    return Steps(lambda: take(pairs[:settings.micro]), step, count, whose)


def width(pairs: Sequence[Pair]) -> int:
    """Returns how many positions each sequence of a micro-batch is padded to."""
    return max(pair.longest for pair in pairs)


def width_flops(backward: Callable[[Pair], Any]) -> Callable[[int], float]:
    """Returns the FLOPs of a forward and a backward pass over a pair of sequences, as a function of their length.

    Attention is quadratic in it and all else linear, so three short pairs say it of every length.
    """
    lengths, counts = (32, 64, 96), []
    for length in lengths:
        ids = np.zeros(length, np.int64)
        # What is compiled has the same products, but their operators are not seen.
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(
                display=False, custom_mapping=ATTENTION) as counter:
            backward(Pair(ids, ids, 1, 1, 1))
        counts.append(counter.get_total_flops())
    return np.poly1d(np.polyfit(lengths, counts, 2))


def measure(system: System, settings: Settings) -> Iterator[Result]:
    """Yields what `clock` does, in this process; the first round has the FLOPs, if wanted."""
    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cpu" if settings.device == "cpu" else "cuda")
    pairs = load(pathlib.Path(settings.pairs_file))
    kernel = contextlib.nullcontext()
    if system.cudnn:
        from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]
        kernel = sdpa_kernel([SDPBackend.CUDNN_ATTENTION])
    with kernel:
        steps = make_steps(system, settings, pairs, device)
        peak = peak_rss if device.type == "cpu" else torch.cuda.max_memory_allocated
        for turn, result in enumerate(clock(settings, steps.first, steps.step, peak)):
            if turn == 0:
                result["loss_from"] = steps.loss_from
            elif turn == 1 and settings.count_flops:
                result["compiler_flops"] = steps.flops()
            if settings.alive and device.type == "cuda":
                torch.cuda.empty_cache()
            yield result
