"""`bench memory table`: what runs on which card, computed by the planners from the full-size models' weights."""

from dataclasses import asdict, replace
from typing import Any

from hunyuan_staged import geometry, options, versions
from hunyuan_staged.decoding import planning
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory import budget, estimates

LONG = 121  # frames
STEPS = 50


def skeleton(layers: int | None = None) -> Any:
    """The transformer on the meta device, of full size, or of so many blocks."""
    import torch

    from hunyuan_staged.models.modules import TransformerConfig, TransformerModules

    with torch.device("meta"):
        return TransformerModules(TransformerConfig(num_layers=layers or versions.LAYERS))


def language_skeleton(layers: int | None = None) -> Any:
    """The language model on the meta device, of the layers that stage 1 runs or of so many."""
    import torch

    from hunyuan_staged.models.language import LanguageModel
    from hunyuan_staged.weights.published import published_language_config

    with torch.device("meta"):
        return LanguageModel(published_language_config(layers))


def table() -> list[tuple[str, ...]]:
    """What runs on each card, computed: (card, stage 1, stage 2 at 720p, with fp8, stage 2 at 480p, stage 3), 121 frames.

    bf16 on one GPU, with another kernel than flash4, which takes less.
    """
    import torch

    from hunyuan_staged.memory import offloading
    from hunyuan_staged.memory.operations import TEXT_TOKENS
    from hunyuan_staged.models.modulations import remove_linears, table_bytes
    from hunyuan_staged.models.vae_modules import VaeConfig, VaeDecoder
    from hunyuan_staged.weights.published import published_language_config
    from hunyuan_staged.weights.quantization import fp8_rows

    dtype, vae = torch.bfloat16, VaeConfig()
    # One block stands for all of them, which are equal: that is built in no time.
    language, whole, halved = language_skeleton(1), skeleton(1), skeleton(1)
    for model in (whole, halved):
        remove_linears(model)
    fp8_rows.quantise_linears(halved.transformer_blocks)
    with torch.device("meta"):
        decoder = sum(tensor.numel() for tensor in VaeDecoder(vae).parameters()) * 2
    layers = replace(
        offloading.weights_of(language, language.layers, dtype), count=published_language_config().num_hidden_layers
    )
    in_bf16, in_float8 = (
        replace(offloading.weights_of(model, model.transformer_blocks, dtype), count=versions.LAYERS)
        for model in (whole, halved)
    )

    width = whole.config.width

    modulations = table_bytes(STEPS, versions.LAYERS, width, dtype.itemsize)

    def working(resolution: str, block: int = 0) -> int:
        tokens = geometry.video_tokens(LONG, *geometry.size_for_ratio(resolution, options.DEFAULT_ASPECT_RATIO))
        return estimates.DenoisingSize(
            tokens, TEXT_TOKENS, width, dtype.itemsize, "cudnn", True, block=block, modulations=modulations
        ).working

    rows = []
    for size in budget.CARDS:
        free = budget.card(size)
        cells = [
            plan_cell(layers, estimates.LANGUAGE_WORKING, free, "layers"),
            plan_cell(in_bf16, working("720p"), free, "blocks"),
            plan_cell(in_float8, working("720p", in_bf16.each), free, "blocks"),
            plan_cell(in_bf16, working("480p"), free, "blocks"),
        ]
        try:
            decoding = planning.fit_decoding(asdict(vae), decoder, 2, (LONG, 720, 1280), free)
            cells.append(f"{decoding.describe()}: {budget.gib(decoding.total)}")
        except InputError:
            cells.append("does not fit")
        rows.append((f"{size} GB", *cells))
    return rows


def plan_cell(weights: budget.BlockWeights, working: int, free: budget.FreeMemory, what: str) -> str:
    """Where the weights of a model of blocks are, and what that takes; what: its blocks are called."""
    try:
        fit = budget.plan_blocks("it", weights, working, free)
    except InputError:
        return "does not fit"
    where = f"{fit.offloaded} of {weights.count} {what} offloaded" if fit.offloaded else "resident"
    return f"{where}: {budget.gib(fit.total)}{' (tight)' if fit.tight else ''}"
