"""Laws of prompts.py: local copies in the layout of the hub, and every mistake one sentence."""

import csv
import json

import pytest

import toy
from evaluation import prompts
from evaluation.prompts import PromptSet, read
from system import hub
from system.files import UserError

BENCHMARK = {
    "anime": ["a cat, by someone", "a cat, by someone", 'the word "cat"'],
    "concept-art": ["a tower \u2028 at dawn"],
    "paintings": ["a cat, by someone", " still life "],
    "photo": ["zwei Hunde auf einer Straße"],
}
TEST_SPLIT = [
    {"prompt": "z", "image_path": ["1.jpg", "2.jpg"], "rank": [1, 0], "raw_annotations": []},
    {"prompt": "a", "image_path": ["3.jpg", "4.jpg"], "rank": [0, 1], "raw_annotations": []},
    {"prompt": "z", "image_path": [], "rank": [], "raw_annotations": []},
]
HEADER = "Prompt\tCategory\tChallenge\tNote"
PARTI = [
    ('"G I G G L E" in graffiti', "World Knowledge", "Writing & Symbols", ""),
    ('a sign that says "Deep"', "Artifacts", "Basic", 'a "note'),
    ("a bee", "Animals", "Basic", ""),
    ("a road with a yellow line ", "Outdoor Scenes", "Basic", ""),
    ('"an unclosed quotation', "Animals", "Basic", ""),
    ("a bee", "Abstract", "Basic", "once more, in another category"),
    ("“a café”, don't you think", "Food & Beverage", "Basic", ""),
]


@pytest.fixture
def hpdv2(tmp_path):
    """A folder in the layout of zhwang/HPDv2."""
    root = tmp_path / "HPDv2"
    (root / "benchmark").mkdir(parents=True)
    for style, texts in BENCHMARK.items():
        path = root / "benchmark" / f"{style}.json"
        path.write_text(json.dumps(texts, ensure_ascii=style == "anime"), "utf-8")
    (root / "benchmark" / "drawbench.json").write_text('["not of this set"]')
    (root / "test.json").write_text(json.dumps(TEST_SPLIT))
    return root


@pytest.fixture
def parti(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text("\n".join([HEADER, *map("\t".join, PARTI), ""]), "utf-8")
    return path


# --------------------------------------------------------------------------------------------------
# Published sets.


def test_toy_is_the_captions_that_alignment_never_sees():
    assert read("toy") == PromptSet("toy", toy.prompts("heldout"), None)
    assert not set(read("toy").prompts) & set(toy.prompts("train"))
    assert read("toy-train") == PromptSet("toy-train", toy.prompts("train"), None)


@pytest.mark.parametrize("layout", ["of the hub", "flat"])
def test_the_benchmark_is_its_four_styles_in_order_with_what_they_repeat(hpdv2, layout):
    found = read(f"hpdv2={hpdv2 if layout == 'of the hub' else hpdv2 / 'benchmark'}")
    assert found.name == "hpdv2"
    assert found.prompts == [text for texts in BENCHMARK.values() for text in texts]
    styles = [style for style, texts in BENCHMARK.items() for _ in texts]
    assert found.categories == styles == sorted(styles)


def test_the_test_split_is_its_prompts_in_the_order_of_the_file(hpdv2):
    expected = PromptSet("hpdv2-test", ["z", "a", "z"], None)
    assert read(f"hpdv2-test={hpdv2}") == read(f"hpdv2-test={hpdv2 / 'test.json'}") == expected


def test_parti_prompts_are_literal_and_have_their_categories(parti):
    found = read(f"parti={parti}")
    assert found == read(f"parti={parti.parent}")
    assert found.name == "parti"
    assert found.prompts == [row[0] for row in PARTI]
    assert found.categories == [row[1] for row in PARTI]


def test_a_table_is_read_as_by_an_unquoted_csv_reader(parti):
    with parti.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    found = read(str(parti))
    assert found.prompts == [row["Prompt"] for row in rows]
    assert found.categories == [row["Category"] for row in rows]


def test_a_copy_may_have_any_file_name(parti, hpdv2):
    assert read(f"parti={parti.rename(parti.with_suffix('.txt'))}").categories
    assert read(f"hpdv2-test={(hpdv2 / 'test.json').rename(hpdv2 / 'photo.txt')}").prompts[0] == "z"


def test_without_a_copy_the_files_come_from_the_data_set_on_the_hub(hpdv2, parti, monkeypatch):
    root = {"zhwang/HPDv2": hpdv2, "nateraw/parti-prompts": parti.parent}

    def download(repository, file, repo_type):
        assert repo_type == "dataset"
        return str(root[repository] / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    for name, copy in {"hpdv2": hpdv2, "hpdv2-test": hpdv2, "parti": parti}.items():
        assert read(name) == read(f"{name}={copy}")


@pytest.mark.parametrize("name", prompts.PUBLISHED)
def test_a_hub_that_cannot_be_reached_is_one_sentence_with_the_way_out(name):
    with pytest.raises(UserError) as error:
        read(name)
    assert str(error.value) == (
        f"Cannot load the prompt set '{prompts.PUBLISHED[name][0]}': the hub cannot be reached; "
        "check the network, or give NAME=PATH of a local copy."
    )


# --------------------------------------------------------------------------------------------------
# Lists of one's own.


def test_a_text_file_has_a_prompt_a_line_and_keeps_what_stands_in_it(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(
        'a "quoted" cat\n\n  a\ttab  \n \t\nline\u2028mark\nein Zug, grün\na\ttab', "utf-8"
    )
    expected = ['a "quoted" cat', "a\ttab", "line\u2028mark", "ein Zug, grün", "a\ttab"]
    assert read(str(path)) == PromptSet("mine", expected, None)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["bare", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_marks_of_an_editor_are_no_part_of_a_prompt(tmp_path, mark, end):
    lines = tmp_path / "a.txt"
    lines.write_bytes(mark + end.join([b"one", b"two", b""]))
    assert read(str(lines)).prompts == ["one", "two"]
    table = tmp_path / "b.tsv"
    table.write_bytes(mark + end.join([b"Prompt\tCategory", b"one\tA", b"", b"two\tB", b""]))
    assert read(str(table)) == PromptSet("b", ["one", "two"], ["A", "B"])
    listed = tmp_path / "test.json"
    listed.write_bytes(mark + b'["one",' + end + b'"two"]')
    assert read(f"hpdv2-test={listed}").prompts == ["one", "two"]


def test_columns_have_any_order_and_cells_at_the_end_may_lack(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("Note\tCategory\tPrompt\tChallenge\nn\tA\tone\tc\n\tB\ttwo\n")
    assert read(str(path)) == PromptSet("x", ["one", "two"], ["A", "B"])


@pytest.mark.parametrize(
    "file, name",
    [
        ("my prompts (v2).txt", "my-prompts-v2-"),
        ("..hidden.txt", "hidden"),
        ("a.b_c-d.txt", "a.b_c-d"),
        ("grün.txt", "grün"),
        ("a=b.txt", "a-b"),
        ("toys=b.txt", "toys-b"),
        ("...txt", "prompts"),
    ],
)
def test_a_file_names_its_set_and_the_name_is_good_for_a_folder(tmp_path, file, name):
    (tmp_path / file).write_text("a prompt")
    assert read(str(tmp_path / file)) == PromptSet(name, ["a prompt"], None)


# --------------------------------------------------------------------------------------------------
# Mistakes: (source, what its file holds, words of the sentence). {} is the test's folder.

TABLE, TEST = "Prompt\tCategory\n", "hpdv2-test={}/a.json"
MISTAKES = {
    "unknown": ("drawbench", None, "'drawbench' is not a prompt set: use toy, toy-train, hpdv2, "),
    "another format": ("{}/a.json", "[]", "is a .json file, not a prompt set: use toy, "),
    "another name": ("mine={}/a", None, "NAME=PATH of a local copy, or a .txt or .tsv file."),
    "no file": ("{}/a.txt", None, "'{}/a.txt' cannot be read: No such file or directory."),
    "no copy": ("parti={}/x", None, "names no local copy: '{}/x' has no PartiPrompts.tsv."),
    "no style": ("hpdv2={}", None, "names no local copy: '{}' has no benchmark/anime.json."),
    "one style": ("hpdv2={}/photo.json", '["x"]', "has no benchmark/anime.json."),
    "no path": ("parti=", None, "'parti=' names no local copy"),
    "not UTF-8": ("{}/a.txt", "grün".encode("latin-1"), "'{}/a.txt' is not UTF-8 text; save it as"),
    "no prompt": ("{}/a.txt", " \n\n", "'{}/a.txt' holds no prompt."),
    "header alone": ("{}/a.tsv", HEADER + "\n", "'{}/a.tsv' holds no prompt."),
    "empty file": ("{}/a.tsv", "", "'{}/a.tsv' has no column 'Prompt', it has "),
    "empty list": (TEST, "[]", "'hpdv2-test={}/a.json' holds no prompt."),
    "not JSON": (TEST, "{", "'{}/a.json' is not JSON: "),
    "an object": (TEST, '{"prompt": "x"}', "'{}/a.json' must be a list of prompts"),
    "a number": (TEST, '["x", 7]', "Entry 1 (from 0) of '{}/a.json' holds no prompt"),
    "no key": (TEST, '[{"text": "x"}]', "Entry 0 (from 0) of '{}/a.json' holds no prompt"),
    "half a character": (
        TEST,
        '["x", "a \\ud83d fox"]',
        "Entry 1 (from 0) of '{}/a.json' holds half",
    ),
    "half of one in an object": (TEST, '[{"prompt": "\\udc00"}]', "Entry 0 (from 0) of '{}/a.json"),
    "deep nesting": (TEST, "[" * 10**5, "'{}/a.json' is nested too deeply to be a list of prom"),
    "half a character in UTF-8": (
        "{}/a.txt",
        b"a \xed\xa0\xbd fox",
        "'{}/a.txt' is not UTF-8 text",
    ),
    "one of nobody": (
        "~nobody-of-this-name/a.txt",
        None,
        "'~nobody-of-this-name/a.txt' cannot be r",
    ),
    "a prompt itself": ("a fox " * 99, None, "is not a prompt set: use toy, "),
    "a blank entry": (TEST, '[" "]', "Entry 0 (from 0) of '{}/a.json' holds no prompt"),
    "no column": ("{}/a.tsv", "Text\tCategory\nx\ty", "has no column 'Prompt', it has Text, Cat"),
    "no category": ("{}/a.tsv", "Prompt\tcategory\nx\ty", "no column 'Category', it has Prompt,"),
    "a tab": ("{}/a.tsv", TABLE + "x\ty\na\tb\tc", "Line 3 of '{}/a.tsv' has 3 cells for 2"),
    "a blank prompt": ("{}/a.tsv", TABLE + " \ty", "Line 2 of '{}/a.tsv' has no Prompt."),
    "a blank cell": ("{}/a.tsv", TABLE + "\nx", "Line 3 of '{}/a.tsv' has no Category."),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_that_names_it(tmp_path, mistake):
    source, content, words = (
        part.replace("{}", str(tmp_path)) if isinstance(part, str) else part
        for part in MISTAKES[mistake]
    )
    if content is not None:
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / source.rsplit("/", 1)[1]).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(source)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match="a.txt' cannot be read: Is a directory."):
        read(str(tmp_path / "a.txt"))
