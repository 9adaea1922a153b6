"""Job files, prompts and seeds: what they ask for, and the line on each that is bad."""

import json
from pathlib import Path

import pytest

from hunyuan_staged.errors import InputError
from hunyuan_staged.jobs.names import check_name, slug
from hunyuan_staged.jobs.reading import Jobs, make_jobs, options_of_job, read_lines, text_of
from hunyuan_staged.options import DecodeOptions, DenoiseOptions, EncodeOptions
from hunyuan_staged.run_options import parse_seeds

ALL = (EncodeOptions(), DenoiseOptions(), DecodeOptions())


def read(folder: Path, name: str, text: str | bytes, seeds: tuple[int, ...] = ()) -> Jobs:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return make_jobs(read_lines(file), seeds, ALL)


def test_the_three_kinds_of_file_ask_for_the_same(tmp_path):
    wanted = [
        ("a-red-circle-seed7", {"prompt": "a red circle", "seed": 7, "fps": 12.0, "save_frames": True}),
        ("second", {"prompt": 'a, "b"', "video_length": 9, "lora": (str(tmp_path), f"{tmp_path}:0.5")}),
    ]
    lines = [
        {"prompt": "a red circle", "seed": 7, "fps": 12, "save_frames": True, "crf": None},
        {"prompt": 'a, "b"', "video_length": 9, "lora": [str(tmp_path), f"{tmp_path}:0.5"], "name": "second"},
    ]
    text = "\n\n".join(map(json.dumps, lines))
    found = read(tmp_path, "jobs.jsonl", text)
    assert [(job.name, job.values) for job in found.good] == wanted and found.bad == ()
    assert [job.place for job in found.good] == ["jobs.jsonl:1", "jobs.jsonl:3"]
    table = (
        "prompt,seed,fps,save_frames,video_length,lora,name\r\n"
        "a red circle,7,12,true,,,\r\n"
        f'"a, ""b""",,,,9,{tmp_path} {tmp_path}:0.5,second\r\n'
    )
    found = read(tmp_path, "jobs.csv", "\ufeff" + table)
    assert [(job.name, job.values) for job in found.good] == wanted and found.bad == ()
    found = read(tmp_path, "jobs.txt", "a red circle\n\n  ein Würfel \r\n")
    assert [job.values for job in found.good] == [{"prompt": "a red circle"}, {"prompt": "ein Würfel"}]
    assert [job.place for job in found.good] == ["jobs.txt:1", "jobs.txt:3"]


def test_a_line_that_is_written_again_is_the_same_job(tmp_path):
    first = read(
        tmp_path, "jobs.jsonl", json.dumps({"prompt": "ein Würfel", "seed": 3, "fps": 8, "lora": [str(tmp_path)]})
    )
    again = read(tmp_path, "jobs.jsonl", text_of(first.good[0]))
    assert again == first


BAD = {
    '{"video_length": 120}': "video_length 120 is not 4n+1; the nearest are 117 and 121",
    '{"video_length": "9"}': "video_length '9' is not a whole number",
    '{"video_length": 9.0}': "video_length 9.0 is not a whole number",
    '{"seed": true}': "seed True is not a whole number",
    '{"seed": -1}': "seed -1 is outside 0 to 2^64 - 1",
    '{"fps": "12"}': "fps '12' is not a number",
    '{"fps": 1e999}': "fps inf is not a finite number",
    '{"fps": NaN}': "is not JSON (NaN is not a number that JSON has)",
    '{"save_frames": 1}': "save_frames 1 is not true or false",
    '{"attn_mode": "fast"}': "attn_mode 'fast' is unknown; known: ",
    '{"sede": 7}': "'sede' is unknown; known: name, model_path",
    '{"output_dir": "x"}': "output_dir is asked of a whole run, on the command line, and not of one job",
    '{"prompt": "\\ud800"}': "prompt is not UTF-8 text",
    '{"seed": 1, "seed": 2}': "has a key twice",
    '{"name": "../x"}': "name '../x' is no name of a folder; allowed are 1 to 80 letters",
    '{"name": "NUL"}': "name 'NUL' is no name of a folder",
    '{"cache_type": "teacache"}': "cache_type needs --enable_cache",
    '{"image_path": "/none.png"}': "image_path /none.png does not exist",
    '{"lora": "x"}': "lora 'x' is not a list of texts",
    "[1]": "holds a JSON list, not an object",
    "{": "is not JSON (",
    "[" * 100_000: "is not JSON (",
}


@pytest.mark.parametrize(("line", "message"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_line_is_named_and_the_others_stand(tmp_path, line, message):
    found = read(tmp_path, "jobs.jsonl", '{"name": "a"}\n' + line + '\n{"name": "b"}\n')
    assert [job.name for job in found.good] == ["a", "b"]
    (said,) = found.bad
    assert said.startswith(f"jobs.jsonl:2 {message}")


def test_bytes_that_are_no_text_are_named(tmp_path):
    found = read(tmp_path, "jobs.jsonl", b'{"name": "a"}\n\xff\xfe\n')
    assert found.bad == ("jobs.jsonl:2 is not UTF-8 text",)
    assert read(tmp_path, "jobs.txt", b"\xff\na cat").bad == ("jobs.txt:1 is not UTF-8 text",)


def test_a_row_of_a_table_that_is_bad_is_named(tmp_path):
    found = read(tmp_path, "jobs.csv", "name,seed\na,seven\nb,2,3\nc,3\n")
    assert [job.name for job in found.good] == ["c"]
    assert found.bad == (
        "jobs.csv:2 seed 'seven' is not a whole number",
        "jobs.csv:3 has 3 cells; the first line has 2",
    )


def test_two_jobs_of_one_name_are_refused(tmp_path):
    found = read(tmp_path, "jobs.jsonl", '{"prompt": "a cat"}\n{"name": "A-cat"}\n')
    assert found.bad == ("jobs.jsonl:2 name A-cat is that of jobs.jsonl:1; give each its own",)
    assert [job.name for job in found.good] == ["a-cat"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("jobs.yaml", "", "--jobs .* is neither .jsonl nor .csv nor .txt"),
        ("jobs.jsonl", "\n \n", "--jobs .* holds no job"),
        ("jobs.csv", "name,name\n", "--jobs jobs.csv:1 has a column twice"),
        ("jobs.csv", b"prompt\n\xff\n", "--jobs jobs.csv is no table"),
        ("jobs.csv", 'name\n"a', "--jobs jobs.csv:2 is no row of a table"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, name, text)
    with pytest.raises(InputError, match=r"none\.jsonl: No such file or directory"):
        read_lines(tmp_path / "none.jsonl")


def test_seeds_make_jobs_of_each_line(tmp_path):
    found = read(tmp_path, "jobs.jsonl", '{"prompt": "a cat"}\n{"name": "x"}\n{"seed": 4}', (1, 2))
    assert [job.name for job in found.good] == ["a-cat-seed1", "a-cat-seed2", "x-seed1", "x-seed2"]
    assert [job.values["seed"] for job in found.good] == [1, 2, 1, 2]
    assert found.bad == ("jobs.jsonl:3 seed 4 contradicts --seeds",)


@pytest.mark.parametrize(
    ("text", "seeds"), [("1-4", [1, 2, 3, 4]), ("1,5,9", [1, 5, 9]), ("7", [7]), ("1-2, 9", [1, 2, 9])]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "1-2-3", "-1", "1.5", "1,1", str(2**64), "0-999999999"])
def test_seeds_that_are_none(text):
    with pytest.raises(InputError, match="--seeds "):
        parse_seeds(text)


def test_names_are_safe_short_and_tell_prompts_apart():
    assert slug("a red circle") == "a-red-circle"
    prompts = [
        "a cat",
        "A cat",
        "a cat.",
        "ein Würfel",
        "一只猫",
        "猫",
        "a/b\\c:d",
        "con",
        "..",
        "x " * 400,
        "x " * 401,
    ]
    names = [slug(prompt) for prompt in prompts]
    assert len(set(names)) == len(names)
    for name in names:
        assert check_name(name) == name and len(name) <= 60


def test_a_jobs_own_values_come_before_those_of_the_command_line(tmp_path):
    (job,) = read(tmp_path, "jobs.jsonl", '{"seed": 3, "fps": 8}').good
    options = options_of_job(DenoiseOptions(seed=9, video_length=5), job)
    assert (options.seed, options.video_length) == (3, 5)
    assert options_of_job(DecodeOptions(), job).fps == 8
