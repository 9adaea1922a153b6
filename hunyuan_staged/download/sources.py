"""Which files a version needs, and from where."""

from dataclasses import replace

from hunyuan_staged import versions
from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import hub
from hunyuan_staged.weights.hub import Source, official_source


def sources_of(name: str, super_resolution: str | None = None, *, four_steps: bool = False) -> list[Source]:
    """What stages 1 to 3 need for a transformer version, e.g. "720p_t2v", the largest first.

    super_resolution: "720p" or "1080p", with every version on the way there. four_steps: LightX2V's transformer in place
    of the version's own, of which the config remains: stage 1 reads it. Raises InputError for a name that is none, and for
    what is not published.
    """
    version = versions.parse_version(name)
    if version.resolution.startswith("demo"):
        raise InputError(f"version {name} is on no hub: the demo's weights come with the package")
    if four_steps and name != hub.FOUR_STEPS_VERSION:
        raise InputError(f"exists for {hub.FOUR_STEPS_VERSION} alone, not for {name}", option="four_steps")
    found = [official_source(f"transformer/{name}")]
    if four_steps:
        found = [hub.FOUR_STEPS_SOURCE, replace(found[0], patterns=(f"transformer/{name}/config.json",))]
    found += [hub.LANGUAGE_SOURCE, official_source("vae"), hub.BYTES_SOURCE, hub.GLYPH_SOURCE]
    found += [official_source("scheduler")] + [hub.IMAGE_SOURCE] * (version.task == "i2v")
    if super_resolution is not None:
        for larger in versions.super_resolution_chain(version.resolution, super_resolution):
            found += [official_source(f"{part}/{larger.name}") for part in ("transformer", "upsampler")]
    return found
