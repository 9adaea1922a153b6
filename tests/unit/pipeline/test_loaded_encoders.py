"""What stage 1 keeps from one job to the next."""

from functools import partial

import pytest
import torch

from hunyuan_staged.encoders import text
from hunyuan_staged.memory.budget import FreeMemory
from hunyuan_staged.options import EncodeOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import encoding
from hunyuan_staged.pipeline.loaded_encoders import LoadedEncoders

WORLD = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("keep", [True, False])
def test_a_negative_prompt_that_all_jobs_have_is_encoded_once(tiny_official, monkeypatch, keep):
    encoded: list[str] = []
    encode = text.encode_prompt

    def counted(tokenizer, model, prompt, **more):
        encoded.append(prompt)
        return encode(tokenizer, model, prompt, **more)

    monkeypatch.setattr(text, "encode_prompt", counted)

    def embeddings(encoders: LoadedEncoders, prompt: str, negative: str) -> dict[str, torch.Tensor]:
        options = EncodeOptions(model_path=str(tiny_official), prompt=prompt, negative_prompt=negative)
        setup = encoding.resolve(options, None, WORLD)
        return encoding.encode(setup, setup.plan(FreeMemory(None, 2**40)), encoders=encoders)

    many = partial(embeddings, LoadedEncoders(keep=keep))
    jobs = [("a", "blurred"), ("b", "blurred"), ("b", "blurred"), ("b", "dark"), ("a", "dark")]
    found = [many(*job) for job in jobs]
    assert encoded == ["a", "blurred", "b", "b", "dark", "a"]
    for job, tensors in zip(jobs, found, strict=True):
        alone = embeddings(LoadedEncoders(), *job)
        assert alone.keys() == tensors.keys()
        assert all(torch.equal(alone[name], tensors[name]) for name in alone)
