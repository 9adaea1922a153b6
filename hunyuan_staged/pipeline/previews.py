"""Previews of a denoising: which colours its VAE gives to latents, and what writes them."""

from pathlib import Path

from hunyuan_staged.attention.kernel_cache import user_cache
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.video import ffmpeg_path
from hunyuan_staged.geometry import TEMPORAL_RATIO
from hunyuan_staged.models.vae_constants import PUBLISHED_VAE
from hunyuan_staged.pipeline.denoising import DenoiseSetup
from hunyuan_staged.pipeline.opening import open_recorded
from hunyuan_staged.run_options import DEFAULT_FPS
from hunyuan_staged.runtime.progress import SILENT, Reporter
from hunyuan_staged.sampling import preview, preview_factors
from hunyuan_staged.sampling.callbacks import Callback
from hunyuan_staged.sampling.preview import Factors
from hunyuan_staged.sampling.preview_writer import PreviewWriter
from hunyuan_staged.weights.components import vae_config
from hunyuan_staged.weights.fingerprint import PREVIEW_FACTORS
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.single_file import TransformerFile

FIT_COMMAND = "python -m hunyuan_staged.fit_preview"


def cached_factors(vae: str) -> Path:
    """Where the factors that a user fitted for a VAE are kept. vae: its fingerprint."""
    return user_cache() / "preview_factors" / f"{vae[:32]}.json"


def make(setup: DenoiseSetup, folder: Path, report: Reporter) -> list[Callback]:
    """What writes the previews that the options ask for: on the first process, else nothing.

    A run that is to stop early leaves one, too. Says which factors give the colours. InputError where no ffmpeg is there,
    and for a VAE that none are known for; where preview_every did not ask, that is a warning.
    """
    every, stops = setup.options.preview_every, setup.options.stop_after is not None
    if not (every or stops) or not setup.world.is_main:
        return []
    try:
        ffmpeg_path()
        factors, origin = choose_factors(vae_folder(setup))
        weights = preview.as_weights(factors, setup.shape[1], setup.world.device)
    except InputError as error:
        if every:
            raise
        report.warn(f"no preview: {error.text}")
        return []
    when = f"previews every {every} steps" if every else "a preview at the end"
    report.info(f"{when} into {folder}; colours by {origin}")
    return [PreviewWriter(folder, weights, fps=DEFAULT_FPS / TEMPORAL_RATIO, every=every, report=report)]


def vae_folder(setup: DenoiseSetup) -> ModelFolder | None:
    """The folder whose VAE will decode the latents, where its files are here; nothing is downloaded for it."""
    config, folder = setup.job.config, setup.folder
    recorded = config.get("model_path")
    single = isinstance(folder, TransformerFile) or "vae" in config
    if single and recorded and Path(recorded).expanduser().exists():
        folder = open_recorded(recorded, config, SILENT)
    return folder if folder.has("vae") else None


def choose_factors(folder: ModelFolder | None) -> tuple[Factors, str]:
    """(factors, whose they are) for the VAE of a folder, None where there is none here.

    Those in its folder or in the user's cache that were fitted for these very weights, else, for a VAE of the published
    shape, those of the published one. InputError, with the command that fits them, where there are none.
    """
    if folder is None:
        return preview_factors.PUBLISHED, "the published VAE's factors: there is no other VAE here"
    vae = folder.fingerprint(["vae"])
    for path in (folder.folders("vae")[0] / PREVIEW_FACTORS, cached_factors(vae)):
        if path.is_file():
            found = preview_factors.load(path)
            if found.vae == vae:
                return found.factors, f"factors fitted for this VAE ({found.explained:.1%} of the variance), {path}"
    config = vae_config(folder)
    if all(_same(config.get(name), value) for name, value in PUBLISHED_VAE.items()):
        return preview_factors.PUBLISHED, "the published VAE's factors"
    raise InputError(
        f"no colours are known for the VAE of {folder.path}; fit them once to finished runs: {FIT_COMMAND} RUN [RUN …]",
        option="preview_every",
    )


def _same(found: object, expected: object) -> bool:
    return tuple(found) == expected if isinstance(found, list | tuple) else found == expected
