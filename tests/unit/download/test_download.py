"""`python -m hunyuan_staged.download` against both hubs' interface on the loopback: whole, broken off, wrong, refused."""

import resource
import socket
from collections import namedtuple
from pathlib import Path

import pytest
from hub_server import drawn, serving

from hunyuan_staged.download import plan, remote, transfer
from hunyuan_staged.download.command import main
from hunyuan_staged.download.sources import sources_of
from hunyuan_staged.errors import InputError
from hunyuan_staged.files import disk

TENCENT, QWEN, GLYPH = "tencent/HunyuanVideo-1.5", "Qwen/Qwen2.5-VL-7B-Instruct", "AI-ModelScope/Glyph-SDXL-v2"
REDUX = "black-forest-labs/FLUX.1-Redux-dev"
COMMUNITY = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v"
PT = "text_encoder/Glyph-SDXL-v2/checkpoints/byt5_model.pt"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIGLIP = {"image_encoder/model.safetensors": drawn(7, 900), "feature_extractor/preprocessor_config.json": b"{}"}
REPOSITORIES = {
    TENCENT: {
        "README.md": b"not wanted",
        "vae/config.json": b'{"latent_channels": 32}',
        f"vae/{WEIGHTS}": drawn(1, 3000),
        "scheduler/scheduler_config.json": b"{}",
        **{
            f"{part}/{name}/{file}": contents
            for part, name in [
                *(("transformer", version) for version in ("720p_t2v", "480p_i2v", "480p_t2v")),
                *(
                    (part, f"{size}_sr_distilled")
                    for part in ("transformer", "upsampler")
                    for size in ("720p", "1080p")
                ),
            ]
            for file, contents in (("config.json", b'{"heads_num": 16}'), (WEIGHTS, drawn(2, 5000)))
        },
    },
    QWEN: {"config.json": b"{}", "model-00001-of-00001.safetensors": drawn(3, 4000), "README.md": b"no"},
    "google/byt5-small": {"config.json": b'{"model_type": "t5"}', "pytorch_model.bin": drawn(4, 100)},
    GLYPH: {
        "assets/color_idx.json": b'{"white": 0}',
        "assets/multilingual_10-lang_idx.json": b"{}",
        "checkpoints/byt5_model.pt": drawn(5, 2000),
        "checkpoints/unet.pt": b"no",
    },
    REDUX: {**SIGLIP, "flux1-redux-dev.safetensors": b"no"},
    COMMUNITY: {**SIGLIP, "vae/config.json": b"no"},
    "lightx2v/Hy1.5-Distill-Models": {"hy1.5_t2v_480p_lightx2v_4step.safetensors": drawn(6, 700)},
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server of its own for each test, and no cache or token of this machine."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving({repo: dict(files) for repo, files in REPOSITORIES.items()}) as server:
        yield server


def run(hub, folder: Path, *flags: str, version: str = "720p_t2v") -> int:
    addresses = ["--endpoint", hub.address, "--modelscope_endpoint", hub.address]
    return main([version, "--model_path", str(folder), *addresses, *flags])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the folder but the hub client's own notes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def of(repo: str, into: str = "", *names: str) -> dict[str, bytes]:
    return {f"{into}{name}": REPOSITORIES[repo][name] for name in names}


T2V = {
    **of(TENCENT, "", "vae/config.json", f"vae/{WEIGHTS}", "scheduler/scheduler_config.json"),
    **of(TENCENT, "", "transformer/720p_t2v/config.json", f"transformer/720p_t2v/{WEIGHTS}"),
    **of(QWEN, "text_encoder/llm/", "config.json", "model-00001-of-00001.safetensors"),
    **of("google/byt5-small", "text_encoder/byt5-small/", "config.json"),
    **of(GLYPH, "text_encoder/Glyph-SDXL-v2/", "assets/color_idx.json", "assets/multilingual_10-lang_idx.json"),
    **of(GLYPH, "text_encoder/Glyph-SDXL-v2/", "checkpoints/byt5_model.pt"),
}


def test_exactly_the_parts_of_a_version_arrive(hub, tmp_path, capsys):
    folder = tmp_path / "model"
    assert run(hub, folder) == 0
    assert contents(folder) == T2V
    total = sum(map(len, T2V.values()))
    said = capsys.readouterr().out
    assert f"{len(T2V)} files, {total / 1e3:.1f} kB; to be fetched: {total / 1e3:.1f} kB; free: " in said
    assert "transformer/720p_t2v " in said and f"5.0 kB  {TENCENT}" in said
    assert said.splitlines()[-1] == (
        f"all files are whole; next: python -m hunyuan_staged.verify --model_path {folder} --version 720p_t2v"
    )
    before = hub.sent.copy()
    assert run(hub, folder) == 0
    assert hub.sent == before
    assert "to be fetched: 0 bytes" in capsys.readouterr().out


def test_a_dry_run_says_what_would_be_fetched_and_writes_nothing(hub, tmp_path, capsys):
    assert run(hub, tmp_path / "model", "--dry_run") == 0
    assert f"{len(T2V)} files" in capsys.readouterr().out
    assert not (tmp_path / "model").exists()


def test_super_resolution_brings_every_version_on_the_way(hub, tmp_path):
    assert run(hub, tmp_path / "model", "--super_resolution", "1080p", version="480p_t2v") == 0
    folders = {Path(name).parent.as_posix() for name in contents(tmp_path / "model")}
    larger = {f"{part}/{size}_sr_distilled" for part in ("transformer", "upsampler") for size in ("720p", "1080p")}
    assert larger < folders and "transformer/480p_t2v" in folders


def test_four_steps_take_the_place_of_the_transformer(hub, tmp_path, capsys):
    assert run(hub, tmp_path / "model", "--four_steps", version="480p_t2v") == 0
    found = contents(tmp_path / "model")
    assert "four_steps/hy1.5_t2v_480p_lightx2v_4step.safetensors" in found
    assert [name for name in found if name.startswith("transformer/")] == ["transformer/480p_t2v/config.json"]
    file = tmp_path / "model" / "four_steps" / "hy1.5_t2v_480p_lightx2v_4step.safetensors"
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"all files are whole; next: bash run_staged.sh --model_path {tmp_path}/model --resolution 480p "
        f"--transformer {file} --four_steps --prompt 'A cat walks on the grass.'"
    )
    assert run(hub, tmp_path / "other", "--four_steps") == 2
    assert capsys.readouterr().err == "error: --four_steps exists for 480p_t2v alone, not for 720p_t2v\n"


@pytest.mark.parametrize("name", [WEIGHTS, "checkpoints/byt5_model.pt"])
def test_a_transfer_that_breaks_off_goes_on_from_there(hub, tmp_path, name):
    """By Hugging Face's client, and by our own requests to ModelScope."""
    hub.cut["vae/" + name if name == WEIGHTS else name] = 1
    assert run(hub, tmp_path / "model") == 0
    assert contents(tmp_path / "model") == T2V
    assert [range for ranges in hub.ranges.values() for range in ranges] == [
        f"bytes={1500 if name == WEIGHTS else 1000}-"
    ]


@pytest.mark.parametrize(
    ("name", "path", "size"),
    [(f"vae/{WEIGHTS}", f"vae/{WEIGHTS}", 3000), ("checkpoints/byt5_model.pt", PT, 2000)],
    ids=["Hugging Face", "ModelScope"],
)
def test_a_run_that_failed_is_gone_on_with_by_the_next(hub, tmp_path, capsys, name, path, size):
    """The hub's own client would begin the 33 GB of a transformer anew."""
    hub.cut[name] = transfer.TRIES
    assert run(hub, tmp_path / "model") == 2
    assert f"breaks off at {size * 7 // 8} of {size} bytes of {name}" in capsys.readouterr().err
    assert not (tmp_path / "model" / path).exists()
    assert transfer.partial_file(tmp_path / "model" / path).stat().st_size == size * 7 // 8
    assert run(hub, tmp_path / "model") == 0
    assert hub.ranges[name][-1] == f"bytes={size * 7 // 8}-"
    assert contents(tmp_path / "model") == T2V


def test_tries_that_bring_something_are_not_counted(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PROGRESS_BYTES", 50)
    hub.cut[f"vae/{WEIGHTS}"] = 5
    assert run(hub, tmp_path / "model") == 0
    assert contents(tmp_path / "model") == T2V and len(hub.ranges[f"vae/{WEIGHTS}"]) == 5


def test_the_key_goes_to_the_hub_and_not_to_where_it_redirects(hub, tmp_path, monkeypatch):
    """A hub's large files lie on other hosts, whose addresses are signed."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving({QWEN: hub.files[QWEN]}) as storage:
        hub.elsewhere["model-00001-of-00001.safetensors"] = storage.address
        assert run(hub, tmp_path / "model") == 0
        assert contents(tmp_path / "model") == T2V
        assert {key for _, key in hub.keys} == {"Bearer hf_secret", None}, "the second hub gets none"
        assert all((key is None) == ("api/v1/models" in path) for path, key in hub.keys)
        assert [key for _, key in storage.keys] == [None]


def test_the_hashes_are_kept_for_verify(hub, tmp_path):
    from hunyuan_staged.verify.hashes import check_hashes

    assert run(hub, tmp_path / "model") == 0
    noted = {
        part: check_hashes(part, [tmp_path / "model" / part], tmp_path / "model")[0].note
        for part in ("vae", "transformer", "text_encoder")
    }
    assert noted == {
        "vae": "2 of 2 files have a known hash",
        "transformer": "2 of 2 files have a known hash",
        "text_encoder": "6 of 6 files have a known hash",
    }


def test_a_page_in_place_of_the_listing_is_one_line(hub, tmp_path, capsys):
    """What a hotel's network gives."""
    hub.page = b"<html>Please log in</html>"
    assert run(hub, tmp_path / "model") == 2
    assert (
        capsys.readouterr().err == f"error: {hub.address} answers for {TENCENT} in a form that is not Hugging Face's\n"
    )


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (f"vae/{WEIGHTS}", f"vae/{WEIGHTS}"),
        ("checkpoints/byt5_model.pt", PT),
        ("vae/config.json", "vae/config.json"),  # no LFS file: git's own hash
    ],
)
def test_a_file_of_another_hash_is_removed(hub, tmp_path, capsys, name, path):
    hub.wrong.add(name)
    assert run(hub, tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/model/{path} arrived broken: its hash is ")
    assert error.endswith("; it is removed, run the same command again\n")
    assert not (tmp_path / "model" / path).exists()
    hub.wrong.clear()
    assert run(hub, tmp_path / "model") == 0
    assert contents(tmp_path / "model") == T2V


def test_another_file_of_the_name_is_left_alone(hub, tmp_path, capsys):
    own = tmp_path / "model" / "vae" / "config.json"
    own.parent.mkdir(parents=True)
    own.write_text("my own")
    assert run(hub, tmp_path / "model") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {own} is there already and is not {TENCENT}'s (it has 6 bytes, and the hub says 23); move it away"
    )
    assert contents(tmp_path / "model") == {"vae/config.json": b"my own"}


def test_a_gated_image_encoder_comes_from_where_it_is_not(hub, tmp_path, capsys):
    hub.gated.add(REDUX)
    assert run(hub, tmp_path / "model", version="480p_i2v") == 0
    found = contents(tmp_path / "model")
    assert {name: found[f"vision_encoder/siglip/{name}"] for name in SIGLIP} == SIGLIP
    assert f"note: {REDUX} is gated: {COMMUNITY} has the same files without" in capsys.readouterr().out


def test_a_gated_repository_without_another_source_is_named(hub, tmp_path, capsys):
    hub.gated.add(QWEN)
    assert run(hub, tmp_path / "model") == 2
    assert capsys.readouterr().err == (
        f"error: {QWEN} wants its licence to be accepted: do so at {hub.address}/{QWEN}, then `hf auth login` (401)\n"
    )
    assert not (tmp_path / "model").exists()


def test_too_little_space_is_said_before_anything_is_fetched(hub, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(10_000, 0, 9_000))
    assert run(hub, tmp_path / "model") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/model: 14.1 kB are to be fetched, and 9.0 kB are free\n"
    assert not (tmp_path / "model").exists()


def test_what_is_left_of_other_files_makes_no_space(hub, tmp_path, capsys):
    """All beginnings in the folder were taken for those of the files that are wanted."""
    hub.cut[f"transformer/480p_t2v/{WEIGHTS}"] = 9
    assert run(hub, tmp_path / "model", version="480p_t2v") == 2
    capsys.readouterr()
    assert run(hub, tmp_path / "model", "--dry_run") == 0
    said = capsys.readouterr().out
    total = sum(map(len, T2V.values()))
    assert f"to be fetched: {plan.size_text(total)}; " in said
    assert run(hub, tmp_path / "model", "--dry_run", version="480p_t2v") == 0
    assert f"to be fetched: {plan.size_text(total)}; " not in capsys.readouterr().out


@pytest.mark.parametrize("limit", [1500, 4500])
def test_a_disk_that_fills_up_is_one_line(hub, tmp_path, capsys, limit):
    """1500 bytes are too few for ModelScope's file, too, but Hugging Face's come first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert run(hub, tmp_path / "model") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.endswith(" cannot be written: File too large\n")
    assert run(hub, tmp_path / "model") == 0
    assert contents(tmp_path / "model") == T2V


def test_a_hub_that_is_not_there_or_says_nothing_is_one_line(hub, tmp_path, capsys, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert main(["720p_t2v", "--model_path", str(tmp_path / "model"), "--endpoint", nowhere]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {nowhere} gives no answer (") and error.count("\n") == 1
    assert error.endswith("; --endpoint URL names a mirror\n")
    monkeypatch.setattr(transfer, "TIMEOUT_SECONDS", 0.3)
    hub.silent.set()
    assert run(hub, tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {hub.address} gives no answer (") and error.count("\n") == 1
    with pytest.raises(InputError, match=r"gives no answer \(.*; --modelscope_endpoint URL names another address$"):
        remote.list_modelscope(sources_of("720p_t2v")[4], hub.address)
    assert not (tmp_path / "model").exists()


def test_a_listing_without_an_end_is_one_line(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(remote, "LISTING_SECONDS", 0.5)
    hub.endless.set()
    try:
        assert run(hub, tmp_path / "model") == 2
        with pytest.raises(
            InputError, match=r"\(timed out: its answer did not end within 0.5 s\); --modelscope_endpoint"
        ):
            remote.list_modelscope(sources_of("720p_t2v")[4], hub.address)
    finally:
        hub.endless.clear()
    error = capsys.readouterr().err
    assert error == (
        f"error: {hub.address} gives no answer (timed out: its answer did not end within 0.5 s); "
        "--endpoint URL names a mirror\n"
    )
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["720p"], "transformer version '720p' is not of the form"),
        (["demo_t2v"], "version demo_t2v is on no hub: the demo's weights come with the package"),
        (["360p_t2v"], f"{TENCENT} holds no transformer/360p_t2v/*"),
        (["480p_t2v", "--super_resolution", "4k"], "super resolution to '4k' does not exist"),
        (["480p_t2v", "--endpoint", "mirror"], "--endpoint mirror is no address of the form https://…"),
    ],
)
def test_what_is_not_published_is_refused(hub, tmp_path, capsys, flags, said):
    assert run(hub, tmp_path / "model", *flags[1:], version=flags[0]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert not (tmp_path / "model").exists()


def test_names_that_lead_out_of_the_folder_are_not_fetched():
    source = sources_of("720p_t2v")[0]
    folder = "transformer/720p_t2v"
    assert remote.wanted(source, [f"{folder}/../../a", f"/{folder}/a", f"{folder}/a"]) == [f"{folder}/a"]
