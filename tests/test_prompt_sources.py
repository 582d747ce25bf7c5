"""Where prompts lie: archives and folders as other programs make them, and paths as people write them."""

import gzip
import io
import os
import struct
import tarfile
from pathlib import Path

import pytest

from draftcli.errors import InputError
from draftcli.prompts import read_prompts
from tests.cli.test_bad_input import expect
from tests.command import draftp

APPLE = struct.pack(">II16sH", 0x00051607, 0x00020000, b"Mac OS X        ", 2) + bytes(102)  # AppleDouble, all ASCII
LINK, HARD, DEVICE, FOLDER = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE


def archive(*members, form=tarfile.PAX_FORMAT) -> bytes:
    """A .tar of (name, content) or (name, type, what it links to)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content, *target in members:
            member = tarfile.TarInfo(name)
            if target:
                member.type, member.linkname = content, target[0]
                tar.addfile(member)
                continue
            body = content.encode() if isinstance(content, str) else content
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


FOX, OWL = ("1.txt", "a fox"), ("2.txt", "an owl")
READ = {
    "macOS": ([("._1.txt", APPLE), FOX, ("./._2.txt", APPLE), OWL, ("__MACOSX/._1.txt", APPLE), (".DS_Store", b"\0")],
              ["a fox", "an owl"], "members that were not read: 3 hidden"),
    "upper case": ([("1.TXT", "a fox"), ("2.Txt", "an owl")], ["a fox", "an owl"], None),
    "folders, long names": ([("a", FOLDER, ""), ("a/" + "n" * 300 + ".txt", "a fox"), ("ü/b/2.txt", "an owl")],
                            ["a fox", "an owl"], None),
    "beside pictures": ([FOX, ("1.jpg", b"\xff\xd8"), ("1.json", "{}")], ["a fox"], None),
    "hard links": ([FOX, ("sub/2.txt", HARD, "1.txt")], ["a fox", "a fox"], None),
    "links": ([("a/1.txt", LINK, "../b/x.dat"), ("a/2.txt", LINK, "1.txt"), ("b/x.dat", "a fox")], ["a fox"] * 2, None),
    "names that lead outside": ([("../1.txt", "a fox"), ("/2.txt", "an owl")], ["a fox", "an owl"],
                                "names of 2 of its members lead outside ('../1.txt')"),
    "devices": ([FOX, ("null.txt", DEVICE, "")], ["a fox"], "1 devices or pipes ('null.txt')"),
    "a later version": ([FOX, ("./1.txt", "a cat")], ["a fox", "a cat"], "1 of its members have the name of"),
    "captions elsewhere": ([FOX, ("2.caption", "an owl")], ["a fox"], "not read: 1 .caption"),
    "a readme": ([FOX, ("README.txt", "This dataset...")], ["a fox"], "1 texts about the data ('README.txt')"),
    "nothing written": ([FOX, ("2.txt", "")], ["a fox", ""], None),
}  # fmt: skip
NOT_READ = {
    "links alone": ([("1.txt", LINK, "../blobs/1")], "member '1.txt' is a link to '../blobs/1', which is no file"),
    "a link to the system": ([("1.txt", LINK, "/etc/passwd")], "is a link to '/etc/passwd'"),
    "links in a circle": ([("1.txt", LINK, "2.txt"), ("2.txt", LINK, "1.txt")], "member '1.txt' is a link to"),
    "other captions": ([("1.caption", "a fox"), ("1.jpg", b"")], "is there, but 1 .caption, 1 .jpg"),
    "macOS's files alone": ([("._1.txt", APPLE)], "but 1 .txt that are hidden files of other programs"),
    "no text": ([("1.txt", b"a\0b")], "member '1.txt': not text, as it holds zero bytes"),
    "no UTF-8": ([("1.txt", b"\xff\xfea\0")], "member '1.txt': not UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize(("members", "texts", "note"), READ.values(), ids=READ)
def test_archives_made_elsewhere(members, texts, note, form):
    Path("p.tar").write_bytes(archive(*members, form=form))
    prompts = read_prompts("p.tar")
    assert [p.text for p in prompts] == texts
    assert len(prompts.notes) == (note is not None)
    assert note is None or note in prompts.notes[0]
    assert os.listdir() == ["p.tar"]  # noqa: PTH208


@pytest.mark.parametrize(("members", "words"), NOT_READ.values(), ids=NOT_READ)
def test_archives_without_what_was_wanted(members, words):
    Path("p.tar").write_bytes(archive(*members))
    with pytest.raises(InputError) as refused:
        read_prompts("p.tar")
    assert words in str(refused.value)


def sparse_archive() -> bytes:
    """GNU's old form, in which a header says that parts of the file are missing."""
    header = bytearray(archive(FOX, form=tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (0, 5)
    header[483:495] = b"%011o\0" % 5
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.tar.gz", gzip.compress(archive(FOX), mtime=0), "a .gz is packed, unpack it first"),
        ("data/p.tgz", gzip.compress(archive(FOX), mtime=0), "a .tgz is packed, unpack it first"),
        ("p.zip", b"PK\3\4", "a .zip is packed, unpack it first"),
        ("p.tar", gzip.compress(archive(FOX), mtime=0), "packed by gzip; unpack it first"),
        ("zip.tar", b"PK\3\4" + bytes(600), "packed by zip; unpack it first"),
        ("p.txt", gzip.compress(b"a fox", mtime=0), "packed by gzip; unpack it first"),
        ("two.tar", archive(FOX) + archive(OWL), "more follows what looks like its end; of several archives in one"),
        ("torn.tar", archive(FOX)[:1024] + b"x" * 512 + archive(OWL), "more follows what looks like its end"),
        ("sparse.tar", sparse_archive(), "member '1.txt' is sparse"),
        (
            "data/p.json",
            b"[]",
            "a .json is not read; expected a .txt, .jsonl, .tar, .csv, .tsv or .parquet file, a folder",
        ),
        ("p.xlsx", b"PK\3\4", "a .xlsx is not read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # packed bytes hold the time
)
def test_files_of_other_kinds_are_refused_by_name(name, content, words):
    Path("data").mkdir()
    Path(name).write_bytes(content)
    expect(draftp("train", "--prompts", name, "--dry-run"), 2, f"data.prompts {name!r}" if name in words else "", words)


def write_files(folder, *files):
    for name, content in files:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_folder_of_captions_is_read_as_a_tar_of_them_is():
    files = [FOX, ("1.png", b""), ("10_x/b.TXT", "a\r\ncat"), ("10_x/a.txt", "\ufeffa dog"), ("._1.txt", APPLE)]
    write_files("owner/name", *files, (".ipynb_checkpoints/1.txt", "a fox"))
    Path("owner/name/link.txt").symlink_to("1.txt")
    for source in ("owner/name", "owner/name/", "./owner/name", str(Path("owner/name").resolve())):
        prompts = read_prompts(source)
        assert [p.text for p in prompts] == ["a fox", "a fox", "a dog", "a cat"]
        assert prompts.notes[0].startswith(f"data.prompts {source}: files that were not read: 2 hidden")
    with tarfile.open("p.tar", "w") as tar:
        tar.add("owner/name", ".")
    assert {p.text for p in read_prompts("p.tar")} == {p.text for p in prompts}
    before = prompts.sha256
    write_files("owner/name", ("1.txt", "a wolf"))
    assert read_prompts("owner/name").sha256 != before


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([("p.jsonl", "{}")], "there is no prompt in this folder: no .txt with a caption is there, but 1 .jsonl"),
        ([("1.png", b""), ("2.png", b""), ("a/3.jpg", b"")], "but 2 .png, 1 .jpg"),
        ([], "there is no prompt in this folder: nothing is there"),
        ([FOX, ("b/2.txt", b"\xff")], "file 'b/2.txt': not UTF-8 text"),
        ([FOX, ("3.txt", "x" * 2_000_000)], "file '3.txt' is longer than"),
    ],
)
def test_folders_without_captions(files, words):
    Path("my/data").mkdir(parents=True)
    write_files("my/data", *files)
    expect(draftp("train", "--prompts", "my/data", "--dry-run"), 2, "data.prompts my/data", words)


def test_a_broken_link_in_a_folder_is_named():
    Path("data").mkdir()
    Path("data/1.txt").symlink_to("../blobs/1")
    expect(draftp("train", "--prompts", "data", "--dry-run"), 2, "(No such file or directory): data/1.txt")


@pytest.mark.parametrize("source", ["./mine", "../mine", "data/", "/data/mine", "a/b/c", "~nobody/mine", "data\\mine"])
def test_paths_that_lead_nowhere_are_not_looked_for_on_the_hub(source):
    with pytest.raises(InputError, match="there is no such file or folder; expected a"):
        read_prompts(source)
