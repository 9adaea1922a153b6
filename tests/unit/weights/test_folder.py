"""Which versions and parts a model folder holds, and what is said where one is absent."""

import json
import re

import pytest
from checkpoints import F32, copied, edit, same

from hunyuan_staged.demo import checkpoint_writer, tiny
from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import BUCKET_BASE
from hunyuan_staged.versions import parse_version
from hunyuan_staged.weights import components, encoder_components
from hunyuan_staged.weights.folder import ModelFolder, open_model
from hunyuan_staged.weights.hub import PARTS


def test_only_version_folders_count(tmp_path):
    for name in ("720p_t2v", "480p_i2v_step_distilled", "720p_i2v_distilled_sparse", "720p_sr_distilled", "notes"):
        (tmp_path / "transformer" / name).mkdir(parents=True)
        (tmp_path / "transformer" / name / "config.json").write_text("{}")
    (tmp_path / "transformer" / "480p_t2v").mkdir()
    model = open_model(tmp_path, ("transformer",))
    assert model.versions() == ["480p_i2v_step_distilled", "720p_i2v_distilled_sparse", "720p_t2v"]
    assert model.resolutions() == ["480p", "720p"]


@pytest.mark.parametrize(
    ("config", "guidance", "name"),
    [
        ({"target_size": 640, "task_type": "t2v"}, 6.0, "480p_t2v"),
        ({"target_size": 960, "task_type": "i2v"}, None, "720p_i2v"),
        ({"target_size": 960, "task_type": "t2v", "use_meanflow": False}, 1.0, "720p_t2v_distilled"),
        ({"target_size": 640, "task_type": "i2v", "use_meanflow": True}, 1.0, "480p_i2v_step_distilled"),
    ],
)
def test_a_diffusers_folder_is_of_the_version_that_its_configs_say(tmp_path, config, guidance, name):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    if guidance is not None:
        (tmp_path / "guider").mkdir()
        (tmp_path / "guider" / "guider_config.json").write_text(json.dumps({"guidance_scale": guidance}))
    assert open_model(tmp_path, ("transformer",)).versions() == [name]


@pytest.mark.parametrize(
    ("pipeline", "encoder", "name"),
    [
        ("HunyuanVideo15Pipeline", False, "480p_t2v"),
        ("HunyuanVideo15ImageToVideoPipeline", True, "480p_i2v"),
        (None, True, "480p_i2v"),
    ],
)
def test_a_diffusers_folder_is_of_its_pipelines_task(tmp_path, pipeline, encoder, name):
    """diffusers' conversion script writes task_type i2v for all; here it says the opposite of the pipeline."""
    (tmp_path / "transformer").mkdir()
    wrong = {"t2v": "i2v", "i2v": "t2v"}[name[-3:]]
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"target_size": 640, "task_type": wrong}))
    if pipeline:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    if encoder:
        (tmp_path / "image_encoder").mkdir()
        (tmp_path / "feature_extractor").mkdir()
    opened = open_model(tmp_path, ("transformer",))
    assert opened.versions() == [name]
    assert components.transformer_config(opened, name)["task_type"] == name[-3:]


def test_a_diffusers_transformer_of_unknown_size_is_refused(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"target_size": 7}')
    with pytest.raises(InputError, match=r"config.json: target_size is 7; allowed is 128, 480, 640, 960, 1440, 256$"):
        open_model(tmp_path, ("transformer",)).versions()


def test_a_version_that_the_folder_lacks_is_refused_with_those_it_holds(tiny_official):
    command = 'hf download tencent/HunyuanVideo-1.5 --include "transformer/720p_t2v/*" --local-dir '
    said = f"{tiny_official} has no transformer 720p_t2v; it holds demo_i2v, demo_t2v; get it: {command}{tiny_official}"
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        components.load_transformer(open_model(tiny_official, ()), "720p_t2v", **F32)


def test_another_version_than_a_diffusers_folder_holds_is_named_with_its_command(tmp_path):
    (tmp_path / "transformer").mkdir()
    config = {"target_size": 960, "task_type": "t2v"}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanVideo15Pipeline"}))
    said = f"{tmp_path} has no transformer 720p_i2v; it holds 720p_t2v; get it: python -m hunyuan_staged.download "
    with pytest.raises(InputError, match=f"^{re.escape(said)}720p_i2v --model_path DIR$"):
        open_model(tmp_path, ()).transformer_folder("720p_i2v")


PUBLISHED = (
    *(f"{size}_{task}{kind}" for size in ("480p", "720p") for task in ("t2v", "i2v") for kind in ("", "_distilled")),
    "480p_i2v_step_distilled",
    "720p_i2v_distilled_sparse",
    "720p_t2v_distilled_sparse",
)


def test_every_published_version_loads_in_both_layouts(tmp_path):
    """The diffusers layout has one version a folder, and no way to say that it is sparse."""
    modules = tiny.build_modules(tiny.TINY, 0, PUBLISHED)
    official = open_model(checkpoint_writer.save_official(tmp_path / "official", modules), ())
    assert official.versions() == sorted(PUBLISHED)
    for name in PUBLISHED:
        version = parse_version(name)
        model = components.load_transformer(official, name, **F32)
        assert model.config.use_meanflow == version.step_distilled
        assert (model.config.target_size, model.config.task_type) == (BUCKET_BASE[version.resolution], version.task)
        if not version.sparse:
            other = open_model(checkpoint_writer.save_diffusers(tmp_path / name, modules, version=name), ())
            assert other.versions() == [name] and other.flow_shift(name) == version.flow_shift
            assert same(model.state_dict(), components.load_transformer(other, name, **F32).state_dict())


def test_the_shift_is_the_diffusers_schedulers(tiny_official, tiny_diffusers, tmp_path):
    assert open_model(tiny_official, ()).flow_shift("demo_t2v") is None
    assert open_model(tiny_diffusers, ()).flow_shift("demo_t2v") == 5.0
    model = copied(tiny_diffusers, tmp_path, "transformer", "scheduler")
    edit(model / "scheduler" / "scheduler_config.json", shift=9)
    assert open_model(model, ()).flow_shift("demo_t2v") == 9.0


@pytest.mark.parametrize(
    ("part", "title", "folder", "command"),
    [
        (
            "transformer",
            "transformer",
            "transformer",
            'hf download tencent/HunyuanVideo-1.5 --include "transformer/720p_t2v/*" --local-dir {path}',
        ),
        ("vae", "VAE", "vae", 'hf download tencent/HunyuanVideo-1.5 --include "vae/*" --local-dir {path}'),
        (
            "text",
            "text encoder",
            "text_encoder/llm",
            "hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir {path}/text_encoder/llm",
        ),
        (
            "glyph",
            "glyph encoder",
            "text_encoder/byt5-small",
            "hf download google/byt5-small --local-dir {path}/text_encoder/byt5-small",
        ),
        (
            "glyph",
            "glyph encoder",
            "text_encoder/Glyph-SDXL-v2",
            "modelscope download --model AI-ModelScope/Glyph-SDXL-v2 --local_dir {path}/text_encoder/Glyph-SDXL-v2",
        ),
        (
            "image",
            "image encoder",
            "vision_encoder/siglip/image_encoder",
            "hf download black-forest-labs/FLUX.1-Redux-dev --local-dir {path}/vision_encoder/siglip",
        ),
    ],
)
def test_a_part_that_is_absent_is_named_with_the_command_that_gets_it(tmp_path, part, title, folder, command):
    for name in PARTS[part].official:
        if name != folder:
            (tmp_path / name).mkdir(parents=True)
    (tmp_path / "vision_encoder").mkdir(exist_ok=True)
    model = ModelFolder(tmp_path, "official")
    assert not model.has(part)
    with pytest.raises(InputError) as refused:
        model.require(part)
    assert str(refused.value) == f"{tmp_path} has no {title} ({folder}); get it: {command.format(path=tmp_path)}"
    (tmp_path / folder).mkdir(parents=True)
    assert model.has(part)
    assert tmp_path / folder in model.require(part)


def test_a_part_that_a_diffusers_folder_lacks_comes_from_its_own_repository(tmp_path):
    (tmp_path / "transformer").mkdir()
    config = {"target_size": 640, "task_type": "i2v"}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as refused:
        encoder_components.load_image_encoder(open_model(tmp_path, ()), **F32)
    assert str(refused.value) == (
        f"{tmp_path} has no image encoder (image_encoder); get it: hf download "
        f'hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v --include "image_encoder/*" --local-dir {tmp_path}'
    )


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=f"^{re.escape(str(tmp_path))} is no model folder: it has neither the official"
    ):
        open_model(tmp_path, ("vae",))


@pytest.mark.parametrize("path", ["no/such/folder", "nowhere", "../nowhere", "/no/folder"])
def test_a_path_that_is_neither_folder_nor_hub_id_is_refused(path):
    with pytest.raises(InputError, match=f"^{re.escape(path)} does not exist, and it is no hub id"):
        open_model(path, ("vae",))
