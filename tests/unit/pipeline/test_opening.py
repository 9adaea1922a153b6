"""Each file of a model of single files is looked at once; what is passed over, and what there are two of, is said."""

from collections import Counter
from pathlib import Path

import part_writer as parts
import pytest
import torch
from transformer_writer import save

from hunyuan_staged.errors import InputError
from hunyuan_staged.options import DenoiseOptions, EncodeOptions
from hunyuan_staged.pipeline.opening import look_at, open_for, open_recorded
from hunyuan_staged.pipeline.transformers import choose_transformer
from hunyuan_staged.runtime.progress import SILENT
from hunyuan_staged.weights import components, part_files, single_file
from hunyuan_staged.weights.folder import open_model
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, to_official


class Said:
    """A reporter that remembers."""

    def __init__(self):
        self.warned: list[str] = []
        self.progress = SILENT.progress

    def info(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warned.append(text)


@pytest.fixture(scope="module")
def model(tiny_official, tmp_path_factory) -> Path:
    """A folder of a file for each part, and an adapter."""
    folder = open_model(tiny_official, ())
    state = components.load_transformer(
        folder, "demo_t2v", device=torch.device("cpu"), dtype=torch.float32
    ).state_dict()
    made = parts.write_files(tiny_official, tmp_path_factory.mktemp("files"), to_official(dict(state), TRANSFORMER_MAP))
    save(made / "style.safetensors", {"a.lora_A.weight": torch.ones(2, 2)})
    return made


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """How often each file's header is read, by the file's name."""
    counted: Counter = Counter()
    real = part_files.recognise

    def recognise(flag, path, **more):
        counted[path.name] += 1
        return real(flag, path, **more)

    monkeypatch.setattr(part_files, "recognise", recognise)
    monkeypatch.setattr(single_file, "recognise", recognise)
    return counted


def test_each_header_is_read_once(model, reads):
    """The transformer's was read three times, and others' twice."""
    said = Said()
    found = open_for(EncodeOptions(), str(model), ("text", "glyph", "vae", "transformer"), said)
    assert {"text", "glyph", "vae"} <= found.files.keys() and found.versions() == ["demo_t2v"]
    assert reads and set(reads.values()) == {1} and len(reads) >= 5
    assert said.warned[0] == f"passed over: {model}/style.safetensors is a LoRA adapter; give it as --lora"
    reads.clear()
    folder, path, version = choose_transformer(DenoiseOptions(model_path=str(model)), {}, Said())
    assert (folder.kind.name, version.name) == ("plain", "demo_t2v") and Path(path).is_relative_to(model)
    assert set(reads.values()) == {1}


def test_two_of_a_part_are_refused_where_it_is_asked_for(model, tiny_official, tmp_path):
    made = parts.write_files(
        tiny_official, tmp_path / "twice", {"double_blocks.0.img_mlp.fc1.weight": torch.ones(1, 1)}
    )
    save(made / "more.safetensors", parts.text(tiny_official))
    files = look_at(made)
    assert files.part("vae").path.name != "more.safetensors"
    with pytest.raises(
        InputError, match=r"two files for the text encoder, more.safetensors and .*; name one by --text_en"
    ):
        open_for(EncodeOptions(), str(made), ("text",), Said())
    assert open_for(EncodeOptions(), str(made), ("vae",), Said()).files.keys() == {"vae"}
    (made / "only").mkdir()
    save(made / "only" / "vae.safetensors", parts.vae(tiny_official))
    with pytest.raises(InputError, match=f"^{made}/only holds no transformer's file$"):
        choose_transformer(DenoiseOptions(model_path=str(made / "only")), {}, Said())


def test_a_recorded_vae_is_all_that_is_read(tiny_official, tmp_path, reads):
    """The model itself may be gone by then."""
    file = save(tmp_path / "vae.safetensors", parts.vae(tiny_official))
    model = open_recorded(str(tmp_path / "gone"), {"vae": str(file)}, SILENT)
    assert model.files["vae"].path == file and reads == {"vae.safetensors": 1}
    assert open_recorded(str(tiny_official), {"vae": str(file)}, SILENT).files["vae"].path == file
    assert open_recorded(str(tiny_official), {}, SILENT).origin("vae") == tiny_official / "vae"
