"""The two sides of `benchmarks.speed.training_step`, which run in a process each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.speed.training_work import CLIP, COMPARED, LEARNING_RATE, TRAINABLE, Work, weights

WARMUP = 2


def run_vr_jax(work: Work, rounds: int) -> dict[str, Any]:
    """Updates the model of vr_jax again and again.

    Args:
        work: The model and the samples.
        rounds: Timed updates.

    Returns:
        The losses of the first updates, the seconds of the timed ones, memory, FLOPs and versions.
    """
    import jax

    from vr_jax.model.parameters import split_stages, unflatten_params
    from vr_jax.model.vlm import abstract_model
    from vr_jax.settings import OptimizerSettings
    from vr_jax.sharding import batch_sharding, make_mesh
    from vr_jax.training import (
        ModelTree,
        abstract_state,
        batch_counts,
        create_state,
        make_optimizer,
        make_schedule,
        make_train_step,
        peak_flops,
        step_flops,
    )

    device = jax.devices()[0]
    mesh = make_mesh(devices=[device])
    tree = ModelTree(work.config)
    trainable = tree.trainable(TRAINABLE)
    settings = OptimizerSettings(lr=LEARNING_RATE, schedule="constant", warmup_ratio=0.0, clip_norm=CLIP)
    schedule = make_schedule(settings, 1)
    optimizer = make_optimizer(settings, schedule, trainable)
    abstract = abstract_state(tree, optimizer, trainable, mesh, work.config.dtype)
    model = abstract_model(work.config)
    model = unflatten_params(model, split_stages(weights(work.config), work.config))
    with jax.set_mesh(mesh):
        state = create_state(tree, optimizer, abstract, model)
        del model
        batch = jax.device_put(packed(work), batch_sharding(mesh))
        counts = {name: float(value) for name, value in jax.jit(batch_counts)(batch).items()}
        update = make_train_step(tree, optimizer, schedule, abstract)

        def step() -> float:
            nonlocal state
            state, metrics = update(state, batch)
            return float(metrics["loss"])

        losses, seconds = _measure(step, rounds)
        stats = device.memory_stats() or {}
    work_done = step_flops(work.config, trainable).total(
        **{name: counts[name] for name in ("tiles", "tokens", "pairs", "targets")}
    )
    return {
        "losses": losses,
        "seconds": seconds,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "model_flops": work_done,
        "peak_flops": peak_flops(device),
        "versions": {"jax": jax.__version__, "device": device.device_kind},
    }


def packed(work: Work) -> Any:
    """The samples as a packed batch of host arrays."""
    from vr_jax.data.collate import collate
    from vr_jax.data.types import Example
    from vr_jax.model.batch import NO_CELL, BatchShape

    sample = np.arange(work.sample_tokens)
    vision = (sample >= work.before) & (sample < work.before + work.cells)
    examples = [
        Example(
            id="sample",
            tokens=tokens,
            loss_mask=sample >= work.sample_tokens - work.targets,
            text_token_mask=np.zeros(work.sample_tokens, bool),
            vision_cell=np.where(vision, sample - work.before, NO_CELL).astype(np.int32),
            tile_pixels=pixels,
            tile_image=np.ones(work.sample_tiles, np.int32),
            cells_per_tile=work.config.cells_per_tile,
        )
        for tokens, pixels in zip(work.tokens(), work.pixels(), strict=True)
    ]
    shape = BatchShape(
        rows=work.rows,
        tokens=work.per_row * work.sample_tokens,
        tiles=work.per_row * work.sample_tiles,
        tile_size=work.config.image.tile_size,
    )
    rows = [examples[begin : begin + work.per_row] for begin in range(0, work.samples, work.per_row)]
    return collate(rows, shape).batch


def run_torch(work: Work, rounds: int) -> dict[str, Any]:
    """Updates the model of transformers with torch.optim.AdamW; arguments and result are those of `run_vr_jax`."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    vision, projector, text = (part.to(device) for part in torch_model(work))
    text.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    text.train()
    parameters = [*projector.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=cuda)
    tokens = torch.from_numpy(work.tokens()).long().to(device)
    pixels = torch.from_numpy(work.pixels()).to(device)
    low = work.config.dtype == "bfloat16"
    autocast = torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext()
    if low:
        vision.to(torch.bfloat16)  # It is frozen.

    def mean_loss(part: slice) -> torch.Tensor:
        """The loss of some samples, as their share of the mean over all targets."""
        ids = tokens[part]
        with torch.no_grad():
            tiles = pixels[part].flatten(0, 1).permute(0, 3, 1, 2).float() * (2 / 255) - 1
            features = vision(tiles.to(vision.dtype), output_hidden_states=True)
            features = features.hidden_states[work.config.vision_feature_layer]
        cells = projector(windows(features, work.config.projector.stride).mean(2)).reshape(len(ids), work.cells, -1)
        embedded = text.get_input_embeddings()(ids)
        at = slice(work.before, work.before + work.cells)
        embedded = torch.cat([embedded[:, : at.start], cells.to(embedded.dtype), embedded[:, at.stop :]], dim=1)
        # Only the logits of the learned tokens are computed, as in vr_jax.
        hidden = text.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = text.lm_head(hidden[:, -work.targets - 1 : -1]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -work.targets :].flatten())
        return loss * len(ids) / work.samples

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for begin in range(0, work.samples, work.micro_batch):
            with autocast:
                loss = mean_loss(slice(begin, begin + work.micro_batch))
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return float(total)

    losses, seconds = _measure(step, rounds)
    return {
        "losses": losses,
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def torch_model(work: Work) -> tuple[Any, Any, Any]:
    """The encoder, the projector and the decoder of transformers with the shared weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    from vr_jax.convert.decoder_configs import write_decoder
    from vr_jax.convert.encoder_configs import write_encoder
    from vr_jax.convert.tables import HEAD, TEXT, VISION, Table, mlp_projector, slots

    config, params = work.config, weights(work.config)
    v, t = config.encoder, config.decoder
    vision = SiglipVisionModel(SiglipVisionConfig(**(write_encoder(v) | {"vision_use_head": False})))
    text = Qwen2ForCausalLM(Qwen2Config(**write_decoder(t)))
    projector = torch.nn.Sequential(
        torch.nn.Linear(v.hidden_size, t.hidden_size), torch.nn.GELU(), torch.nn.Linear(t.hidden_size, t.hidden_size)
    )

    def load(module: Any, table: Table, ours: tuple[str, ...], prefix: str = "") -> None:
        own = {path: array for path, array in params.items() if path.startswith(ours)}
        state = {prefix + name: torch.from_numpy(slot.take(own)) for name, slot in slots(table, own).items()}
        missing, unexpected = module.load_state_dict(state, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise RuntimeError(f"{type(module).__name__}: missing {missing}, unexpected {unexpected}")

    load(_inner(vision), VISION, ("encoder.",))
    load(text.model, TEXT, ("decoder.embed.", "decoder.layers.", "decoder.norm."))
    if not t.tie_word_embeddings:
        load(text, HEAD, ("decoder.lm_head.",))
    load(projector, mlp_projector("0", "2"), ("projector.",))
    return vision.eval().requires_grad_(False), projector, text


def _inner(vision: Any) -> Any:
    """The module inside `vision_model`, an attribute that transformers 5.2 and later no longer have."""
    return getattr(vision, "vision_model", vision)


def windows(features: Any, stride: int) -> Any:
    """Groups patches in raster order (M, P, D) into windows (M, cells, stride * stride, D)."""
    count, patches, width = features.shape
    cells = round(patches**0.5) // stride
    grid = features.reshape(count, cells, stride, cells, stride, width).transpose(2, 3)
    return grid.reshape(count, cells * cells, stride * stride, width)


def _measure(step: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Runs updates; returns the losses of the first and the seconds of those after the warm-up."""
    losses, seconds = [], []
    for _ in range(max(WARMUP + rounds, COMPARED)):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    return losses[:COMPARED], seconds[WARMUP:]
