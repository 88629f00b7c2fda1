import json

import datasets
import pytest

from moe.train.data import DataConfig
from moe.train.data.documents import Document
from moe.train.data.file_source import FileSource
from moe.train.data.hub_source import HubSource, StreamSource
from moe.train.data.sources import open_source
from moe.train.data.stdlib_source import StdlibSource


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def ids(source):
    return [document.id for document in source.documents()]


def texts(source):
    return [document.text for document in source.documents()]


# the standard library


@pytest.fixture
def library(tmp_path):
    for name in ("b.py", "a.py", "json/tool.py", "test/test_a.py", "x/tests/y.py", "idlelib/idle_test/z.py"):
        write(tmp_path / name, f"# {name}\n")
    for name in ("site-packages/torch.py", "__pycache__/a.py", "notes.txt"):
        write(tmp_path / name, "left out\n")
    write(tmp_path / "empty.py", "")
    write(tmp_path / "latin.py", b"# caf\xe9\n")
    write(tmp_path / "pydoc_data/topics.py", "# made\ntopics = {'if': 'The \"if\" statement\\n', 'for': 'Loop.'}\n")
    return tmp_path


def test_stdlib_documents_are_sources_and_topics_without_tests(library):
    assert list(StdlibSource(library).documents()) == [
        Document("a.py", "# a.py\n"),
        Document("b.py", "# b.py\n"),
        Document("json/tool.py", "# json/tool.py\n"),
        Document("latin.py", "# caf\ufffd\n"),
        Document("pydoc_data/topics/if", 'The "if" statement\n'),
        Document("pydoc_data/topics/for", "Loop."),
    ]


def test_stdlib_identity_follows_the_files(library):
    before = StdlibSource(library).identity()
    assert StdlibSource(library).identity() == before
    write(library / "a.py", "# changed!\n")
    assert StdlibSource(library).identity() != before
    json.dumps(before)


def test_stdlib_without_sources_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"data.source='stdlib' found no"):
        ids(StdlibSource(tmp_path))


def test_real_stdlib():
    names = ids(StdlibSource())
    assert len(names) > 400 and len(set(names)) == len(names)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name or "test" in name.split("/")[:-1] for name in names)
    assert names == ids(StdlibSource())


# text files


def test_small_single_file_has_several_documents_that_join_to_it(tmp_path):
    text = "".join(f"line {number}\n" for number in range(500))
    source = FileSource(str(write(tmp_path / "x.txt", text)))
    assert len(ids(source)) >= 4
    assert "".join(texts(source)) == text
    assert ids(source)[:2] == ["x.txt#0", "x.txt#1"]


def test_short_files_are_one_document_each_in_path_order_with_relative_ids(tmp_path):
    for name in ("b/x.txt", "a/y.txt", "a/empty.txt", "a/blank.txt"):
        write(tmp_path / name, {"empty": "", "blank": " \n\n"}.get(name[2:-4], f"text of {name}\n"))
    source = FileSource(str(tmp_path / "**" / "*.txt"))
    assert list(source.documents()) == [
        Document("a/y.txt#0", "text of a/y.txt\n"),
        Document("b/x.txt#0", "text of b/x.txt\n"),
    ]


def test_large_files_are_cut_into_64_kib(tmp_path):
    source = FileSource(str(write(tmp_path / "x.txt", "word " * (1 << 20))))
    lengths = [len(text) for text in texts(source)]
    assert max(lengths) <= 1 << 16 and len(lengths) < 90


def test_path_with_glob_characters_is_taken_literally(tmp_path):
    assert texts(FileSource(str(write(tmp_path / "x[1].txt", "hello")))) == ["hello"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing/*.txt", "matches no file: write 'stdlib', the path or glob"),
        ("stdlb", "'stdlb' matches no file"),
        ("{folder}", r"is a folder: name its files with a glob, e.g. .*/\*\*/\*.txt"),
        ("{folder}/*", "'notes.md', which is none of .txt, .jsonl, .parquet"),
    ],
)
def test_bad_paths(tmp_path, pattern, message):
    write(tmp_path / "notes.md", "x")
    with pytest.raises(ValueError, match=message):
        ids(FileSource(pattern.format(folder=tmp_path)))


# jsonl


def test_jsonl_skips_empty_rows_and_survives_bad_bytes(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"text": "first"}',
        b'{"text": null}',
        b'{"text": ""}',
        b'{"text": " \\n"}',
        b"",
        b'{"other": 1}',
        b'{"text": "caf\xe9", "other": {"nested": [1]}}',
        b'{"text": "half \\ud800 pair, whole \\ud83d\\ude00"}',
    ]
    source = FileSource(str(write(tmp_path / "x.jsonl", b"\n".join(lines))))
    assert list(source.documents()) == [
        Document("x.jsonl#1", "first"),
        Document("x.jsonl#7", "caf\ufffd"),
        Document("x.jsonl#8", "half ? pair, whole 😀"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 of .*x.jsonl is not JSON"),
        ('["a"]', "line 1 of .* is a JSON list, not an object"),
        ('{"text": 5}', "data.text_column='text' of line 1 of .* holds int, not text"),
        ('{"body": "a"}\n{"title": "b"}', "x.jsonl has no column 'text'; it has body, title: set data.text_column"),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        ids(FileSource(str(write(tmp_path / "x.jsonl", content))))


def test_other_text_column(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"body": "a", "text": "b"}')
    assert texts(FileSource(str(path), "body")) == ["a"]


# parquet


@pytest.fixture
def parquet(tmp_path):
    rows = {"text": ["one", None, "", "two"], "number": [1, 2, 3, 4]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
    return str(tmp_path / "x.parquet")


def test_parquet_rows(parquet):
    assert list(FileSource(parquet).documents()) == [Document("x.parquet#0", "one"), Document("x.parquet#3", "two")]


def test_parquet_without_the_column(parquet):
    with pytest.raises(ValueError, match=r"x.parquet has no column 'body'; it has number, text: set data.text_column"):
        ids(FileSource(parquet, "body"))
    with pytest.raises(ValueError, match=r"data.text_column='number' of .* holds int"):
        ids(FileSource(parquet, "number"))


def test_files_are_read_without_the_network(parquet, tmp_path, monkeypatch):
    write(tmp_path / "x.jsonl", '{"text": "three"}')
    write(tmp_path / "x.txt", "four")

    def refuse(*args, **kwargs):
        raise AssertionError("a local file needs no network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    assert texts(FileSource(str(tmp_path / "x.*"))) == ["three", "one", "two", "four"]


def test_parquet_of_many_row_groups_is_read_in_order(tmp_path):
    rows = [f"row {number}" for number in range(1000)]
    datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "x.parquet", batch_size=100)
    assert texts(FileSource(str(tmp_path / "x.parquet"))) == rows
    assert ids(FileSource(str(tmp_path / "x.parquet")))[-1] == "x.parquet#999"


# hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the network: a dataset of three rows under the name a/b."""
    rows = datasets.Dataset.from_dict({"text": ["one", "", "two"]})

    def load_dataset(name, hub_config, *, split, streaming):
        if name != "a/b":
            raise datasets.exceptions.DatasetNotFoundError(f"{name} does not exist")
        assert (hub_config, split) == ("en", "train")
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_rows(hub):
    source = open_source(DataConfig(source="hub:a/b", hub_config="en"))
    assert isinstance(source, HubSource) and source.label == "hub:a/b"
    assert list(source.documents()) == [Document("a/b#0", "one"), Document("a/b#2", "two")]
    json.dumps(source.identity())


def test_stream_head_has_ids_from_the_text(hub):
    source = open_source(DataConfig(source="hub:a/b", hub_config="en", streaming=True))
    assert isinstance(source, StreamSource)
    assert texts(source) == ["one", "two"]
    assert ids(source)[0] == "a/b#7692c3ad3540bb80"  # sha256 of "one"
    assert texts(StreamSource("a/b", "en", "train", "text", head_bytes=3)) == ["one"]


def test_hub_errors_name_the_fields(hub):
    with pytest.raises(ValueError, match=r"'hub:a/c' \(data.hub_config=None, data.split='test'\).*does not exist"):
        ids(open_source(DataConfig(source="hub:a/c", split="test")))
    with pytest.raises(ValueError, match=r"hub:a/b has no column 'body'; it has text: set data.text_column"):
        ids(open_source(DataConfig(source="hub:a/b", hub_config="en", text_column="body")))


def test_open_source_kinds():
    assert isinstance(open_source(DataConfig()), StdlibSource)
    assert open_source(DataConfig(source="x.txt", text_column="t")) == FileSource("x.txt", "t")
