"""Stage 1 with --rewrite: who is asked, what is encoded and recorded, what is reused, and what happens on failure."""

import base64
import io
import json

import pytest
import qwen_writer
import torch
from chat_server import chatting, completion, failure
from PIL import Image

from hunyuan_staged import geometry
from hunyuan_staged.encoders import endpoint
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.config import read_config
from hunyuan_staged.files.tensors import load_embeddings
from hunyuan_staged.memory.budget import FreeMemory
from hunyuan_staged.options import EncodeOptions
from hunyuan_staged.parallel.world import lone_world
from hunyuan_staged.pipeline import encoding, encoding_records
from hunyuan_staged.pipeline.common import free_memory
from hunyuan_staged.runtime.progress import Reporter

PROMPT = 'a card that says "AB"'
LONG = 'A white card, which says "AB", stands still on a dark blue background.'
NAMES = ("T2V_REWRITE_BASE_URL", "T2V_REWRITE_MODEL_NAME", "I2V_REWRITE_BASE_URL", "I2V_REWRITE_MODEL_NAME")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (*NAMES, endpoint.KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(endpoint.time, "sleep", lambda _: None)


class Listener(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")


def resolve(model, folder, **options):
    chosen = EncodeOptions(model_path=str(model), output_dir=str(folder), **{"prompt": PROMPT, **options})
    chosen.check()
    return encoding.resolve(chosen, encoding.read_image(chosen), lone_world())


def run(model, folder, **options) -> list[str]:
    """Stage 1, as the script does it; what was said."""
    heard = Listener()
    setup = resolve(model, folder, **options).rewrite(heard)
    encoding_records.write(setup, encoding.encode(setup, setup.plan(free_memory(setup.world)), heard))
    return heard.lines


def records(folder) -> tuple[dict, dict]:
    return read_config(folder), load_embeddings(folder)[1]


def test_the_long_prompt_is_encoded_and_both_are_recorded(tiny_official, tmp_path):
    with chatting(completion(LONG)) as server:
        said = run(tiny_official, tmp_path / "a", rewrite=server.address, rewrite_model="m")
        who = f"m at {server.address}, instructions t2v_en"
        assert said[:2] == [f"asking {who}", f"rewritten by {who}: {LONG!r}"]
        assert server.asked[0][2]["messages"][1] == {"role": "user", "content": PROMPT}
    run(tiny_official, tmp_path / "b", prompt=LONG)
    ours, theirs = (load_embeddings(tmp_path / name)[0] for name in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for found in records(tmp_path / "a"):
        assert (found["prompt"], found["rewritten_prompt"], found["rewrite_model"]) == (PROMPT, LONG, "m")
        assert len(found["rewrite_sha256"]) == 64
    for found in records(tmp_path / "b"):
        assert not [name for name in found if name.startswith("rewr")]
    hashes = [load_embeddings(tmp_path / name)[1]["made_from_sha256"] for name in "ab"]
    assert hashes[0] != hashes[1]


def test_the_same_question_is_not_asked_again_and_another_is(tiny_official, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("Write.")
    with chatting(completion(LONG)) as server:

        def asked(**options) -> int:
            before = len(server.asked)
            setup = resolve(tiny_official, tmp_path, **{"rewrite": server.address, "rewrite_model": "m", **options})
            said = Listener()
            rewritten = setup.rewrite(said).rewritten
            assert rewritten is not None and rewritten.prompt == LONG
            if len(server.asked) == before:
                assert said.lines[0].startswith("rewritten in an earlier run, and not again (m at http://127.")
            return len(server.asked) - before

        assert asked() == 1, "nothing is recorded before the embeddings are"
        run(tiny_official, tmp_path, rewrite=server.address, rewrite_model="m")
        assert asked() == 0
        assert asked(rewrite_model="n") == 1
        assert asked(prompt='another "AB"') == 1
        assert asked(rewrite_instructions=str(own)) == 1
        before = len(server.asked)
        rows = resolve(tiny_official, tmp_path, rewrite=server.address, rewrite_model="m").rewriter.rows(
            FreeMemory(None, 0)
        )
        assert rows == {"rewriting": f"as in an earlier run: {LONG!r}"} and len(server.asked) == before


def test_for_an_image_the_other_variables_count_and_the_image_goes_along(tiny_official, tmp_path, monkeypatch):
    picture = tmp_path / "red.png"
    Image.new("RGB", (90, 3), "red").save(picture)
    with chatting(completion(LONG)) as server:
        monkeypatch.setenv("I2V_REWRITE_BASE_URL", server.address)
        monkeypatch.setenv("I2V_REWRITE_MODEL_NAME", "of i2v")
        setup = resolve(tiny_official, tmp_path / "out", rewrite="api", image_path=str(picture)).rewrite()
        content = server.asked[0][2]["messages"][1]["content"]
        assert server.asked[0][2]["model"] == "of i2v"
        assert [part["type"] for part in content] == ["image_url", "text"]
        sent = Image.open(io.BytesIO(base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])))
        assert sent.size == geometry.nearest_size("demo", 3 / 90)[::-1]
        one = setup.rewritten.identity
        Image.new("RGB", (64, 64), "blue").save(picture)
        other = resolve(tiny_official, tmp_path / "out", rewrite="api", image_path=str(picture)).rewriter.identity
    assert setup.rewritten.prompt == LONG and one != other


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (failure(401, "who are you"), "refuses (401 who are you); the key is $REWRITE_API_KEY"),
        (completion("A card."), "the rewritten prompt has lost the quoted text 'AB'"),
        (completion('"AB" ' + "word " * 1200), "tokens; at most 1000 are allowed"),
        (completion(""), "the rewritten prompt is empty"),
    ],
)
def test_without_an_answer_the_prompt_is_taken_as_it_is_or_refused(tiny_official, tmp_path, reply, reason):
    with chatting(reply) as server:
        given = {"rewrite": server.address, "rewrite_model": "m"}
        heard = Listener()
        setup = resolve(tiny_official, tmp_path, **given).rewrite(heard)
        assert setup.prompt == PROMPT and setup.rewritten.record == {}
        (warning,) = [line for line in heard.lines if line.startswith("warning: ")]
        assert warning.endswith(f"{reason}; the prompt is used as it was given")
        with pytest.raises(InputError) as caught:
            resolve(tiny_official, tmp_path, **given, strict=True).rewrite()
        assert str(caught.value).endswith(f"{reason}; --strict refuses that")


def test_a_rewriting_that_failed_is_tried_again_by_the_next_run(tiny_official, tmp_path):
    with chatting(failure(400, "no"), completion(LONG)) as server:
        run(tiny_official, tmp_path, rewrite=server.address, rewrite_model="m")
        assert [name for found in records(tmp_path) for name in found if name.startswith("rewr")] == []
        run(tiny_official, tmp_path, rewrite=server.address, rewrite_model="m")
    assert read_config(tmp_path)["rewritten_prompt"] == LONG


@torch.no_grad()
def written(folder, ids: torch.Tensor, count: int, end: int) -> list[int]:
    """What transformers' own model writes, of at most so many tokens."""
    options = {"do_sample": False, "repetition_penalty": 1.05, "max_new_tokens": count, "eos_token_id": [end]}
    mask = torch.ones_like(ids)
    output = qwen_writer.reference(folder).generate(ids, attention_mask=mask, pad_token_id=0, **options)
    return output[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def whole(tiny_official, tmp_path_factory):
    """A folder whose language model can write, and comes to an end."""
    folder = qwen_writer.write_whole(tiny_official, tmp_path_factory.mktemp("whole") / "model")
    rewriter = resolve(folder, folder / "none", prompt="a cat", rewrite="local").rewriter
    from hunyuan_staged.encoders.language_model import chat_ids

    ids = torch.tensor([chat_ids(rewriter.tokenizer, rewriter.instructions, "a cat")])
    end = rewriter.tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokens = written(folder, ids, 30, 10**6)
    qwen_writer.swap_tokens(folder, next(token for token in tokens[4:] if token not in tokens[:4]), end)
    tokens = written(folder, ids, 200, end)
    assert tokens.index(end) == len(tokens) - 1 > 2
    return folder, rewriter.tokenizer.decode(tokens[:-1], skip_special_tokens=True)


@pytest.mark.parametrize("offloaded", [False, True])
def test_the_folders_own_language_model_writes(whole, tmp_path, offloaded):
    """Twice the same, also with its layers on the host; the second run reuses what the first was answered."""
    from hunyuan_staged.encoders.rewriting import accepted

    folder, written = whole
    options = {"prompt": "a cat", "rewrite": "local", "enable_offloading": offloaded}
    said = run(folder, tmp_path, **options)
    config = read_config(tmp_path)
    assert config["rewritten_prompt"] == accepted(written, "a cat")
    assert config["rewrite_model"] == "local"
    layers = "4 of 4 (as asked)" if offloaded else "none (no GPU)"
    assert said[0] == f"the text encoder's language model, instructions t2v_en: offloaded layers: {layers}"
    assert said[1].startswith("rewritten by the text encoder's language model, instructions t2v_en: ")
    assert run(folder, tmp_path, **options)[0].startswith("rewritten in an earlier run, and not again (the text enc")


def test_a_dry_run_says_what_the_language_model_takes_and_refuses_what_does_not_fit(whole, tmp_path):
    folder, _ = whole
    rewriter = resolve(folder, tmp_path, prompt="a cat", rewrite="local").rewriter
    (row,) = rewriter.rows(FreeMemory(None, 2**40)).values()
    assert row == (
        "the text encoder's language model, instructions t2v_en: 1 MiB, torch.float32, offloaded layers: none (no GPU); "
        "freed afterwards"
    )
    with pytest.raises(
        InputError, match=r"^--rewrite local needs 1 MiB of host memory .*: --rewrite URL, which asks a s"
    ):
        rewriter.rows(FreeMemory(None, 1000))
    server = resolve(folder, tmp_path, prompt="a cat", rewrite="http://127.0.0.1:1", rewrite_model="m").rewriter
    assert server.rows(FreeMemory(None, 0)) == {
        "rewriting": "m at http://127.0.0.1:1, instructions t2v_en; asked before the encoding"
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rewrite_model": "m"}, "--rewrite_model goes with --rewrite alone"),
        ({"rewrite_instructions": "x"}, "--rewrite_instructions goes with --rewrite alone"),
        (
            {"rewrite": "local", "rewrite_model": "m"},
            "--rewrite_model names a server's model; --rewrite local has its own",
        ),
        ({"rewrite": "local", "rewrite_instructions": "nowhere"}, "--rewrite_instructions nowhere does not exist"),
        ({"rewrite": "local", "prompt": " "}, "--rewrite needs a --prompt to rewrite"),
        ({"rewrite": "api"}, "--rewrite api takes the address from $T2V_REWRITE_BASE_URL, which is not set"),
        ({"rewrite": "localhost:8000", "rewrite_model": "m"}, "--rewrite 'localhost:8000' is not allowed"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, options, said):
    with pytest.raises(InputError) as caught:
        EncodeOptions(output_dir=str(tmp_path), **options).check()
    assert str(caught.value).startswith(said)


def test_a_prompt_that_waits_to_be_rewritten_is_not_encoded(tiny_official, tmp_path):
    with pytest.raises(AssertionError, match="has not been rewritten yet"):
        _ = resolve(tiny_official, tmp_path, rewrite="http://127.0.0.1:1", rewrite_model="m").prompt


def test_the_question_holds_our_own_instructions(tiny_official, tmp_path):
    with chatting(completion("一张白色卡片，写着“AB”，静止不动。")) as server:
        given = {"rewrite": server.address, "rewrite_model": "m", "prompt": "卡片写着“AB”"}
        assert resolve(tiny_official, tmp_path, **given).rewrite().prompt == "一张白色卡片，写着“AB”，静止不动。"
        asked = server.asked[0][2]
    assert asked["messages"][0]["content"].startswith("你为一个文生视频模型撰写提示词")
    assert json.dumps(asked).count("image_url") == 0
