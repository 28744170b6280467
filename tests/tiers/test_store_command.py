"""``rootcellar store``."""

import json
import os

import pytest
from stores import file_store, fill, get, put

from rootcellar import cli
from rootcellar.tiers.stores import segment
from rootcellar.tiers.stores.audit import holdings

DAY = 86400


@pytest.fixture
def folder(tmp_path):
    """Twenty small pages of one identity, used ten days after 1970 began, and five large ones of another, of day 20."""
    path = tmp_path / "store"
    for identity, day, pages, nbytes in (("one", 10, range(20), 5000), ("two", 20, range(50, 55), 100_000)):
        store = file_store(path, identity=identity, now=lambda day=day: day * DAY)
        fill(store, pages, nbytes)
        store.close()
    return path


def flip(folder, identity, at=None, bit=1):
    """A bit of the first page of an identity, or of byte ``at`` of its file."""
    (holding,) = (h for h in holdings(folder) if h.identity == identity)
    with holding.path.open("r+b") as file:
        file.seek(holding.file_bytes - holding.slots * holding.slot_bytes + 100 if at is None else at)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ bit]))


def test_ls_tells_pages_bytes_and_ages_by_identity(folder, capsys):
    assert cli.main(["store", "ls", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [(line.split()[0], line.split()[-1]) for line in lines[1:]] == [("20", "one"), ("5", "two")]
    assert cli.main(["store", "ls", str(folder), "--json"]) == 0
    one, two = sorted(json.loads(capsys.readouterr().out), key=lambda row: row["identity"])
    assert (one["pages"], one["page_bytes"], one["oldest"], one["slot_bytes"]) == (20, 100_000, 10 * DAY, 8192)
    assert (two["pages"], two["page_bytes"], two["last_used"]) == (5, 500_000, 20 * DAY)


def test_check_reads_every_page_and_shows_what_is_damaged(folder, capsys):
    assert cli.main(["store", "check", str(folder)]) == 0
    assert capsys.readouterr().out == "25 pages read, 0 damaged\n"
    flip(folder, "two")
    (folder / "99999999.pages").write_bytes(b"no store wrote this")
    assert cli.main(["store", "check", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "slot 0, page " in said
    assert "its checksum is" in said
    assert "99999999.pages: it begins with" in said
    assert said.endswith("25 pages read, 2 damaged\n")
    assert cli.main(["store", "check", str(folder), "--mend"]) == 0
    assert capsys.readouterr().out.endswith("25 pages read, 2 damaged, and forgotten\n")
    assert cli.main(["store", "check", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"pages": 24, "damaged": [], "mended": False}


def test_check_of_an_entry_with_a_length_that_its_slot_cannot_have(folder, capsys):
    flip(folder, "one", segment.BLOCK + segment.ENTRY.fields["length"][1] + 1, bit=16)  # 904 bytes instead of 5000
    assert cli.main(["store", "check", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "slot 0, page " in said
    assert said.endswith("25 pages read, 1 damaged\n")


def test_check_while_somebody_writes(folder, capsys):
    store = file_store(folder, identity="one")
    put(store, [100])
    assert cli.main(["store", "check", str(folder)]) == 0
    assert "26 pages read, 0 damaged" in capsys.readouterr().out
    for words in (["check", str(folder), "--mend"], ["prune", str(folder), "--max-size", "0"]):
        assert cli.main(["store", *words]) == cli.EXIT_MISTAKE
        assert f"process {os.getpid()} writes in" in capsys.readouterr().err
    store.close()


def test_prune_by_age_and_by_size(folder, capsys, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 30.0 * DAY)
    assert cli.main(["store", "prune", str(folder), "--older-than", "25d"]) == 0
    assert capsys.readouterr().out.startswith("0 pages are gone")
    assert cli.main(["store", "prune", str(folder), "--older-than", "15d"]) == 0
    assert capsys.readouterr().out.startswith("20 pages are gone")
    assert [holding.identity for holding in holdings(folder)] == ["two"]
    assert cli.main(["store", "prune", str(folder), "--max-size", "2MiB"]) == 0
    store = file_store(folder, identity="two")
    assert get(store, 50, 100_000)
    store.close()
    assert cli.main(["store", "prune", str(folder), "--max-size", "0"]) == 0
    assert holdings(folder) == []


def test_prune_to_a_size_takes_the_least_recently_used_first(folder, capsys):
    sizes = {holding.identity: holding.file_bytes for holding in holdings(folder)}
    assert cli.main(["store", "prune", str(folder), "--max-size", str(sum(sizes.values()) - 1), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"pages": 20, "file_bytes": sizes["one"]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ls", "/no/such/folder"], "is no folder"),
        (["check", "/no/such/folder", "--mend"], "is no folder"),
        (["prune", "."], "--max-size or --older-than"),
        (["prune", ".", "--older-than", "soon"], "like 90m"),
        (["prune", ".", "--max-size", "much"], "--max-size='much'"),
        (["ls", ".", "--mend"], "--mend belongs to check"),
        (["check", ".", "--max-size", "1GB"], "belong to prune"),
    ],
)
def test_mistakes(words, said, capsys):
    assert cli.main(["store", *words]) == cli.EXIT_MISTAKE
    assert said in capsys.readouterr().err
