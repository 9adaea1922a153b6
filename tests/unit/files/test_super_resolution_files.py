"""The files of super resolution beside those of the base run: names, which are decoded, and what they were made from."""

import re

import pytest
import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract, provenance
from hunyuan_staged.files.tensors import load_latents, load_state, save_latents, save_state
from hunyuan_staged.geometry import BUCKET_BASE, resolution_of, size_buckets
from hunyuan_staged.options import DecodeOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline.decode_jobs import choose_latents, locks
from hunyuan_staged.runtime.progress import Reporter
from hunyuan_staged.sampling.state import RunIdentity, StateSaver

SMALL, LARGE = torch.zeros(1, 32, 1, 6, 10), torch.ones(1, 32, 1, 12, 20)


def test_files_are_told_apart_by_their_names():
    assert contract.at_resolution(contract.VIDEO_FILE, None) == "output_video.mp4"
    assert contract.at_resolution(contract.VIDEO_FILE, "720p") == "output_video_720p.mp4"
    assert contract.at_resolution(contract.LATENTS_FILE, "1080p") == "stage2_latents_1080p.safetensors"
    assert contract.at_resolution("/a.b/clip.mp4", "720p") == "/a.b/clip_720p.mp4"


def test_latents_and_states_lie_beside_those_of_the_base(tmp_path):
    save_latents(tmp_path, SMALL, {"seed": "1"})
    save_latents(tmp_path, LARGE, {"seed": "2"}, "demo_hd")
    assert torch.equal(load_latents(tmp_path)[0], SMALL)
    latents, metadata = load_latents(tmp_path, "demo_hd")
    assert torch.equal(latents, LARGE)
    assert (metadata["seed"], metadata["height"], metadata["width"]) == ("2", "192", "320")
    save_state(tmp_path, {"latents": LARGE}, {"step": "3"}, "demo_hd")
    assert load_state(tmp_path, "demo_hd")[1]["step"] == "3"
    assert {path.name for path in tmp_path.iterdir()} == {
        "stage2_latents.safetensors",
        "stage2_latents_demo_hd.safetensors",
        "stage2_state_demo_hd.safetensors",
    }


def test_the_largest_latents_are_decoded_unless_others_are_asked_for(tmp_path):
    def chosen(latents: str | None = None) -> str | None:
        return choose_latents(DecodeOptions(input_dir=str(tmp_path), latents=latents))

    assert chosen() is None
    save_latents(tmp_path, SMALL, {})
    assert chosen() is None
    save_latents(tmp_path, SMALL, {}, "1080p")
    save_latents(tmp_path, SMALL, {}, "720p")
    assert (chosen(), chosen("720p"), chosen("base")) == ("1080p", "720p", None)


def test_latents_of_a_former_run_are_passed_over(tmp_path):
    class Told(Reporter):
        def warn(self, text: str) -> None:
            told.append(text)

    told: list[str] = []
    options, report = DecodeOptions(input_dir=str(tmp_path)), Told()
    smaller = None
    for number, resolution in enumerate((None, "720p", "1080p")):
        source = contract.at_resolution(contract.LATENTS_FILE, smaller)
        made = (
            {contract.ENLARGED_FROM: source, contract.LATENTS_HASH: provenance.sha256(tmp_path / source)}
            if number
            else {}
        )
        save_latents(tmp_path, SMALL + number, made, resolution)
        assert choose_latents(options, report) == resolution
        smaller = resolution
    assert told == []
    save_latents(tmp_path, SMALL - 1, {})
    assert choose_latents(options, report) is None
    assert [
        line.endswith(f"passed over, --latents {name} decodes it")
        for line, name in zip(told, ("1080p", "720p"), strict=True)
    ]
    assert all("stage2_latents_720p.safetensors was made from latents with sha256" in line for line in told)


def test_latents_that_are_not_there_are_said_to_come_from_super_resolution(tmp_path):
    said = "stage2_latents_720p.safetensors does not exist; run stage2_transformer.py --super_resolution 720p first"
    with pytest.raises(InputError, match=re.escape(said)):
        locks(DecodeOptions(input_dir=str(tmp_path), latents="720p"))
    with pytest.raises(InputError, match=re.escape(said)):
        load_latents(tmp_path, "720p")
    with pytest.raises(InputError, match=r"stage2_latents.safetensors does not exist; run stage2_transformer.py first"):
        locks(DecodeOptions(input_dir=str(tmp_path), latents="base"))


def test_latents_of_a_base_run_that_has_been_replaced_are_noticed(tmp_path):
    save_latents(tmp_path, SMALL, {})
    base = provenance.sha256(tmp_path / contract.LATENTS_FILE)
    about = {contract.ENLARGED_FROM: contract.LATENTS_FILE, contract.LATENTS_HASH: base}
    assert provenance.latents_mismatch(tmp_path, {}, about, "720p") is None
    save_latents(tmp_path, SMALL + 1, {})
    now = provenance.sha256(tmp_path / contract.LATENTS_FILE)
    assert provenance.latents_mismatch(tmp_path, {}, about, "720p") == (
        f"{tmp_path}/stage2_latents_720p.safetensors was made from latents with sha256 {base[:12]}…, "
        f"which {tmp_path}/stage2_latents.safetensors has since replaced (sha256 {now[:12]}…)"
    )
    (tmp_path / contract.LATENTS_FILE).unlink()
    assert provenance.latents_mismatch(tmp_path, {}, about, "720p") is None, "nothing tells"
    # The embeddings come first, as for the base.
    made = about | {contract.EMBEDDINGS_HASH: "0" * 64}
    said = provenance.latents_mismatch(tmp_path, {contract.EMBEDDINGS_HASH: "1" * 64}, made, "720p")
    assert "stage2_latents_720p.safetensors was made from embeddings with sha256 000000000000…" in said


def test_what_a_file_says_does_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "secret").write_text("other bytes")
    about = {contract.ENLARGED_FROM: "../secret", contract.LATENTS_HASH: "0" * 64}
    assert provenance.latents_mismatch(tmp_path / "run", {}, about, "720p") is None


def test_a_size_tells_its_resolution():
    assert [resolution_of(*size) for size in ((480, 848), (720, 1280), (1072, 1904), (96, 160), (192, 320))] == [
        "480p",
        "720p",
        "1080p",
        "demo",
        "demo_hd",
    ]
    assert resolution_of(1080, 1920) is None
    sizes = [size for base in BUCKET_BASE.values() for size in size_buckets(base)]
    assert len(sizes) == len(set(sizes)), "no size is in the buckets of two"


def test_a_stopped_super_resolution_has_a_state_of_its_own(tmp_path):
    def saver(settings: dict) -> StateSaver:
        return StateSaver(
            tmp_path,
            RunIdentity(settings, {}, {}),
            steps=4,
            every=0,
            world=World(0, 1, torch.device("cpu")),
        )

    assert saver({}).path == tmp_path / contract.STATE_FILE
    assert saver({"super_resolution": "720p"}).path == tmp_path / "stage2_state_720p.safetensors"
