"""From rows of any source to token pairs: every format and file, what is dropped and cut, and the cache."""

import gzip
import json

import datasets
import pytest
import tiny
import zstandard

from orpo_jax import data
from orpo_jax.config import DataConfig
from orpo_jax.data import from_rows, load_pairs, read_source
from orpo_jax.preference import Encoder
from orpo_jax.pretrained import open_pretrained

ROWS = tiny.make_rows(23, "standard")
KINDS = ["standard", "implicit", "conversational", "conversational_implicit"]


@pytest.fixture(scope="module")
def pretrained(model_folder):
    return open_pretrained(str(model_folder))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of its own for every test."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def settings(**changes):
    return DataConfig(**{"train": "rows.jsonl", "max_length": 64, **changes})


def load(source, pretrained, **changes):
    return load_pairs(source, pretrained, settings(**changes))[0]


def as_lists(pairs):
    """Returns pairs in a form that compares."""
    return [(pair.chosen_ids.tolist(), pair.rejected_ids.tolist(), *pair[2:]) for pair in pairs]


# Sources


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


WRITERS = {
    "rows.jsonl": lambda path, rows: path.write_bytes(jsonl(rows)),
    "rows.ndjson": lambda path, rows: path.write_bytes(jsonl(rows)),
    "lines.json": lambda path, rows: path.write_bytes(jsonl(rows)),
    "array.json": lambda path, rows: path.write_text(json.dumps(rows, indent=2)),
    "windows.jsonl": lambda path, rows: path.write_bytes(jsonl(rows).replace(b"\n", b"\r\n") + b"\r\n\r\n"),
    "byte_order_mark.jsonl": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + jsonl(rows)),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(jsonl(rows))),
    "rows.jsonl.zst": lambda path, rows: path.write_bytes(zstandard.compress(jsonl(rows))),
    "two_frames.jsonl.zst": lambda path, rows: path.write_bytes(
        zstandard.compress(jsonl(rows[:9])) + zstandard.compress(jsonl(rows[9:]))),
    "array.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "rows.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(str(path)),
    "folder": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(str(path)),
    "splits": lambda path, rows: datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:2])).save_to_disk(str(path)),
}
STANDARD_WRITERS = {
    "rows.csv": lambda path, rows: datasets.Dataset.from_list(rows).to_csv(str(path), index=False),
    "rows.csv.gz": lambda path, rows: path.write_bytes(gzip.compress(
        datasets.Dataset.from_list(rows).to_pandas().to_csv(index=False).encode())),
}


@pytest.fixture(scope="module")
def expected(pretrained, tmp_path_factory):
    """The pairs of each kind of rows, handed over as a list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", tmp_path_factory.mktemp("expected"))
        return {kind: as_lists(load(from_rows(tiny.make_rows(23, kind), "rows"), pretrained)) for kind in KINDS}


@pytest.mark.parametrize(("name", "kind"), [
    *((name, kind) for name in WRITERS for kind in ("standard", "conversational")),
    *((name, "standard") for name in STANDARD_WRITERS),
])
def test_every_format_gives_the_same_pairs(tmp_path, pretrained, expected, name, kind):
    path = tmp_path / name
    (WRITERS | STANDARD_WRITERS)[name](path, tiny.make_rows(23, kind))
    assert as_lists(load(read_source(str(path), None, "train", "data.train"), pretrained)) == expected[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_program_give_the_same_pairs(pretrained, expected, kind):
    rows = tiny.make_rows(23, kind)
    for given in (iter(rows), tuple(rows), datasets.Dataset.from_list(rows)):
        assert as_lists(load(from_rows(given, "rows"), pretrained)) == expected[kind]


def test_a_split_of_a_folder_can_be_chosen(tmp_path, pretrained, expected):
    WRITERS["splits"](tmp_path / "splits", ROWS)
    source = read_source(str(tmp_path / "splits"), None, "test", "data.train")
    assert as_lists(load(source, pretrained)) == expected["standard"][:2]


def test_other_columns_and_odd_characters_change_nothing(tmp_path, pretrained):
    """Columns may differ from row to row, and line separators of Unicode are no ends of lines."""
    rows = [{**row, "prompt": row["prompt"] + "\u2028天 \x85 é"} for row in ROWS]
    for ascii_only in (True, False):
        more = [{**row, "score": i if i % 2 else {"a": [i]}} for i, row in enumerate(rows)]
        (tmp_path / "rows.jsonl").write_text(
            "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in more), encoding="utf-8")
        source = read_source(str(tmp_path / "rows.jsonl"), None, "train", "data.train")
        assert as_lists(load(source, pretrained)) == as_lists(load(from_rows(rows, "rows"), pretrained))


def test_blank_lines_are_skipped_and_keep_their_numbers(tmp_path, pretrained, expected):
    lines = jsonl(ROWS).decode().splitlines()
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(lines))
    source = read_source(str(file), None, "train", "data.train")
    assert as_lists(load(source, pretrained)) == expected["standard"]
    file.write_text("\n\n".join([*lines[:2], "{}"]))
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 5: needs the column chosen"):
        load(read_source(str(file), None, "train", "data.train"), pretrained)


# Tokenised rows and their cache


def test_processes_change_nothing(pretrained, monkeypatch):
    monkeypatch.setattr(data, "TOKENIZER_BATCH", 5)
    rows = from_rows(ROWS, "rows")
    one = as_lists(load(rows, pretrained))
    for file in (data.CACHE / "tokenised").iterdir():
        file.unlink()
    assert as_lists(load(rows, pretrained, dataset_num_proc=2)) == one


def test_a_process_s_error_names_the_row(pretrained):
    with pytest.raises(ValueError, match=r"^rows, row 2: needs the column rejected"):
        load(from_rows([ROWS[0], {"chosen": "a"}], "rows"), pretrained, dataset_num_proc=2)


@pytest.fixture
def tokenised(monkeypatch):
    """Counts the pairs that are tokenised."""
    count = [0]
    real = Encoder.__call__

    def counting(self, batch):
        count[0] += len(batch)
        return real(self, batch)

    monkeypatch.setattr(Encoder, "__call__", counting)
    return count


def test_rows_are_tokenised_once(tmp_path, pretrained, tokenised):
    file = tiny.write_rows(tmp_path / "rows.jsonl", ROWS)
    first = load(read_source(str(file), None, "train", "data.train"), pretrained)
    assert tokenised[0] == len(ROWS)
    again = load(read_source(str(file), None, "train", "data.train"), open_pretrained(str(pretrained.folder)))
    assert tokenised[0] == len(ROWS) and as_lists(again) == as_lists(first)
    # What is done with the pairs is not what is cached.
    load(from_rows(datasets.Dataset.from_list(ROWS), "rows"), pretrained)
    assert tokenised[0] == 2 * len(ROWS)
    load(read_source(str(file), None, "train", "data.train"), pretrained, identical="keep", overlong="drop",
         dataset_num_proc=2, packing=False, shuffle=False)
    assert tokenised[0] == 2 * len(ROWS)


@pytest.mark.parametrize("changes", [
    {"max_length": 63}, {"max_prompt_length": 8}, {"max_completion_length": 8}, {"truncation_mode": "keep_start"},
])
def test_other_settings_are_tokenised_anew(pretrained, tokenised, changes):
    rows = from_rows(ROWS, "rows")
    load(rows, pretrained)
    load(rows, pretrained, **changes)
    assert tokenised[0] == 2 * len(ROWS)


def test_other_rows_tokenizers_templates_and_stop_tokens_are_tokenised_anew(model_folder, pretrained, tokenised,
                                                                           tmp_path):
    rows = tiny.make_rows(5, "conversational")
    edited = [{**rows[0], "chosen": [{"role": "assistant", "content": "good day"}]}, *rows[1:]]
    no_bos = tiny.write_model(tmp_path / "no_bos", tokenizer=tiny.make_tokenizer(bos=None))
    stops = tiny.write_model(tmp_path / "stops")
    (stops / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    for count, (some, model) in enumerate([
            (rows, pretrained), (edited, pretrained), (rows[:4], pretrained), (rows[::-1], pretrained),
            (rows, open_pretrained(str(no_bos))), (rows, open_pretrained(str(stops))),
            (rows, open_pretrained(str(model_folder), chat_template=tiny.TEMPLATE.replace("'<|'", "'<| '"))),
            (rows, pretrained)]):
        before = tokenised[0]
        load(from_rows(some, "rows"), model)
        assert (tokenised[0] > before) == (count < 7), count


def test_a_failure_leaves_no_cache(pretrained, cache):
    with pytest.raises(ValueError, match="row 2"):
        load(from_rows([ROWS[0], {"chosen": "a"}], "rows"), pretrained)
    assert not [path for path in cache.rglob("*") if path.is_file()]


# What is kept

LONG = {"prompt": "the sky", "chosen": " blue" * 90, "rejected": " green"}
SAME = {"prompt": "the sky", "chosen": " is", "rejected": " is"}
EMPTY = {"prompt": "the sky", "chosen": "", "rejected": " is"}


def test_over_long_pairs_may_be_cut_or_dropped_or_stop_the_run(pretrained):
    source = from_rows([ROWS[0], LONG, ROWS[1]], "rows")
    pairs, counts = load_pairs(source, pretrained, settings())
    assert (len(pairs), counts["overlong"], counts["truncated"]) == (3, 1, 1)
    assert len(pairs[1].chosen_ids) == 64
    pairs, counts = load_pairs(source, pretrained, settings(overlong="drop"))
    assert (len(pairs), counts["overlong"], counts["truncated"]) == (2, 1, 0)
    assert as_lists(pairs) == as_lists(load(from_rows(ROWS[:2], "rows"), pretrained))
    with pytest.raises(ValueError, match=r"^rows, row 2: the pair is longer than data\.max_length \(64\)"):
        load_pairs(source, pretrained, settings(overlong="error"))


def test_a_pair_that_just_fits_is_not_over_long(pretrained):
    longest = int(load(from_rows(ROWS, "rows"), pretrained).sequence_lengths().max())
    for length, overlong in ((longest, 0), (longest - 1, 1)):
        counts = load_pairs(from_rows(ROWS, "rows"), pretrained, settings(max_length=length))[1]
        assert (counts["overlong"] > 0) == overlong


@pytest.mark.parametrize(("identical", "empty", "kept"), [
    ("drop", "drop", [0, 3]), ("keep", "drop", [0, 1, 3]), ("drop", "keep", [0, 2, 3]), ("keep", "keep", [0, 1, 2, 3])])
def test_identical_and_empty_pairs_are_counted_and_dropped_or_kept(pretrained, identical, empty, kept):
    rows = [ROWS[0], SAME, EMPTY, ROWS[1]]
    pairs, counts = load_pairs(from_rows(rows, "rows"), pretrained, settings(identical=identical, empty=empty))
    assert counts == {"rows": 4, "identical": 1, "empty": 1, "overlong": 0, "pairs": len(kept), "truncated": 0}
    everything = as_lists(load(from_rows(rows, "rows"), pretrained, identical="keep", empty="keep"))
    assert as_lists(pairs) == [everything[i] for i in kept]


def test_lengths_are_those_of_the_pairs(pretrained):
    pairs = load(from_rows([ROWS[0], SAME, *ROWS[1:]], "rows"), pretrained)
    assert pairs.sequence_lengths().tolist() == [[len(p.chosen_ids), len(p.rejected_ids)] for p in pairs]
    assert pairs.max_id() == max(int(max(p.chosen_ids.max(), p.rejected_ids.max())) for p in pairs)


def test_ids_and_positions_past_the_tables_are_errors(pretrained):
    pairs = load(from_rows(ROWS, "rows"), pretrained)
    most, longest = pairs.max_id(), int(pairs.sequence_lengths().max())
    data.check_tables(pairs, most + 1, longest, "data.train")
    with pytest.raises(ValueError, match=rf"^data\.train: token ids must be below .* \({most}\), got {most}"):
        data.check_tables(pairs, most, longest, "data.train")
    with pytest.raises(ValueError, match=rf"^data\.train: sequences .* {longest - 1} positions, got {longest}"):
        data.check_tables(pairs, most + 1, longest - 1, "data.train")


def test_a_damaged_cache_file_is_made_again(tmp_path, pretrained, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    config = DataConfig(train="rows", max_length=64)
    digest = load_pairs(from_rows(ROWS, "rows"), pretrained, config)[0].digest()
    (file,) = (tmp_path / "tokenised").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    again, _ = load_pairs(from_rows(ROWS, "rows"), pretrained, config)
    assert again.digest() == digest


def test_rows_that_hold_no_text_are_named():
    with pytest.raises(ValueError, match=r"rows, row 2: must hold strings or messages"):
        from_rows([{"chosen": "a", "rejected": "b"}, {"chosen": {1}, "rejected": "b"}], "rows")
