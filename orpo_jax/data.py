"""A dataset -> cached token pairs."""

import concurrent.futures
import contextlib
import dataclasses
import gzip
import hashlib
import json
import multiprocessing
import os
import pathlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import zstandard

from orpo_jax import packing
from orpo_jax.config import DataConfig
from orpo_jax.metrics import Progress, log
from orpo_jax.packing import Pair, Room
from orpo_jax.preference import Encoder, render, split_prompt
from orpo_jax.pretrained import Pretrained

CACHE = pathlib.Path(os.environ.get("ORPO_JAX_CACHE", "~/.cache/orpo_jax")).expanduser()
# The one column of rows that are still text: a name that no data set uses.
JSON = "orpo_jax:json"
# Rows per call of the tokenizer, which runs a batch on all cores.
TOKENIZER_BATCH = 512


# Sources


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows by index. JSON rows stay text until they are read: their columns may differ from row to row."""

    rows: datasets.Dataset
    name: str
    unit: str  # what the index counts: 'line' of a file, or 'row'
    hash: str

    def where(self, index: int) -> str:
        return f"{self.name}, {self.unit} {index + 1}"


def read_source(source: str, name: str | None, split: str, key: str) -> Source:
    """Returns the rows of a file, a folder or a hub id; ValueError names the source and what is wrong with it."""
    path = pathlib.Path(source).expanduser()
    kinds = path.name.removesuffix(".gz").removesuffix(".zst").rsplit(".", 1)
    kind = {"jsonl": "json", "ndjson": "json"}.get(kinds[-1], kinds[-1])
    local = path.exists()
    if not source or (not local and (kind in ("json", "csv", "parquet") or source.startswith((".", "/", "~")))):
        raise ValueError(f"{key}: no such file or folder, got {source!r}")
    try:
        if local and path.is_dir():
            rows = _read_folder(path, split, key)
        elif local and kind == "json":
            return _read_json(path)
        elif local and kind in ("csv", "parquet"):
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        elif local:
            raise ValueError(f"{key}: must be a .jsonl, .json, .parquet or .csv file (also .gz or .zst), a folder "
                             f"or a hub id, got {source!r}")
        else:
            rows = datasets.load_dataset(source, name, split=split)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(key) else f"{key}: {source}: {error}") from error
    except Exception as error:  # datasets, arrow and the hub's client raise many kinds
        cause = error.__cause__ or error
        reason = (str(cause).strip() or repr(cause)).splitlines()[0]
        raise ValueError(f"{key}: {source} can't be read: {reason}") from error
    return Source(rows, source, "row", rows._fingerprint)


def _read_folder(path: pathlib.Path, split: str, key: str) -> datasets.Dataset:
    if not ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        return datasets.load_dataset(str(path), split=split)
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise ValueError(f"{key}_split: {path} has the splits {', '.join(map(str, loaded))}, got {split!r}")
    return loaded[split]


def _read_json(path: pathlib.Path) -> Source:
    """Returns a file's rows as lines of JSON, unparsed: a file may hold one array, or a row a line."""
    unpack = {".gz": gzip.decompress, ".zst": _unpack_zst}.get(path.suffix, bytes)
    text = unpack(path.read_bytes()).decode("utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            lines, unit = [json.dumps(row) for row in json.loads(text)], "row"
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error}") from None
    else:
        lines, unit = text.split("\n"), "line"
    return Source(datasets.Dataset.from_dict({JSON: lines}), str(path), unit, _hash(text))


def _unpack_zst(data: bytes) -> bytes:
    """Returns the content of all frames; zstandard's own file object takes a file cut short for a whole one."""
    parts = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(data))
        if not frame.eof:
            raise EOFError("the file ends in the middle of a frame")
        data = frame.unused_data
    return b"".join(parts)


def from_rows(rows: Iterable[Mapping[str, Any]] | datasets.Dataset, name: str) -> Source:
    """Returns rows that a program hands over."""
    if isinstance(rows, datasets.Dataset):
        return Source(rows, name, "row", rows._fingerprint)
    lines = []
    for i, row in enumerate(rows):
        try:
            lines.append(json.dumps(row))
        except TypeError as error:
            raise ValueError(f"{name}, row {i + 1}: must hold strings or messages, got {error}") from None
    return Source(datasets.Dataset.from_dict({JSON: lines}), name, "row", _hash(*lines))


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


# Rows to token pairs, cached


class Pairs(Sequence[Pair]):
    """Token pairs: the ids of all sequences end to end, and where each starts."""

    def __init__(self, table: pa.Table, keep: np.ndarray):
        self.keep = keep
        # Ids added to the end of each sequence, for routers of experts: their statistics have the last response token,
        # which is an input only where something follows it.
        self.tail = 0
        self._flat, self._starts = {}, {}
        for side in ("chosen", "rejected"):
            column = table.column(f"{side}_ids").combine_chunks()
            self._flat[side] = column.values.to_numpy(zero_copy_only=False)
            self._starts[side] = column.offsets.to_numpy()
        self._prompt = {side: table.column(f"{side}_prompt").to_numpy() for side in ("chosen", "rejected")}
        self._shared = table.column("shared").to_numpy()
        # Prompts that an encoder reads; a decoder's are part of the sequences.
        self.encodes = table.column("encoder_ids").null_count < len(table)
        if self.encodes:
            column = table.column("encoder_ids").combine_chunks()
            self._flat["encoder"] = column.values.to_numpy(zero_copy_only=False)
            self._starts["encoder"] = column.offsets.to_numpy()

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        row = self.keep[index]
        ids = [self._flat[side][slice(*self._starts[side][row:row + 2])] for side in ("chosen", "rejected")]
        if self.tail:
            ids = [np.append(some, np.zeros(self.tail, some.dtype)) for some in ids]
        prompt = self._flat["encoder"][slice(*self._starts["encoder"][row:row + 2])] if self.encodes else None
        return Pair(ids[0], ids[1], int(self._prompt["chosen"][row]), int(self._prompt["rejected"][row]),
                    int(self._shared[row]), prompt)

    def encoder_lengths(self) -> np.ndarray:
        """Returns the tokens of each prompt that an encoder reads: none, for a decoder."""
        return np.diff(self._starts["encoder"])[self.keep] if self.encodes else np.zeros(len(self), np.int64)

    def sequence_lengths(self) -> np.ndarray:
        """Returns the tokens of each whole sequence, [pairs, 2]: chosen, rejected."""
        return np.stack([np.diff(self._starts[side])[self.keep] for side in ("chosen", "rejected")], axis=1)

    def prompt_lengths(self) -> np.ndarray:
        """Returns how many tokens of each sequence are prompt, [pairs, 2]."""
        return np.stack([self._prompt[side][self.keep] for side in ("chosen", "rejected")], axis=1)

    def lengths(self, share_prompt: bool) -> np.ndarray:
        """Returns the positions that each pair takes of a row."""
        chosen, rejected = self.sequence_lengths().T + self.tail
        return packing.pair_length(chosen, rejected, self._shared[self.keep], share_prompt)

    def branches(self, share_prompt: bool) -> np.ndarray:
        """Returns what packing.branch_lengths does of each pair."""
        return packing.branch_lengths(self.sequence_lengths() + self.tail, self._shared[self.keep], share_prompt)

    def sizes(self, share_prompt: bool) -> np.ndarray:
        """Returns what each pair takes of a row, [pairs, 4]: a Room of each."""
        lengths = self.lengths(share_prompt)
        scored = (self.sequence_lengths() - np.maximum(self.prompt_lengths(), 1)).sum(axis=1)
        return np.stack(Room(lengths, np.ones_like(lengths), self.lengths(share_prompt=False), scored), axis=1)

    def digest(self) -> str:
        """Returns a hash of the token ids themselves: a run that goes on must see the same, wherever they come from."""
        arrays = (*self._flat.values(), *self._starts.values(), *self._prompt.values(), self.keep)
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:32]

    def max_id(self) -> int:
        return max((int(ids.max(initial=0)) for ids in self._flat.values()), default=0)


def from_pairs(pairs: Sequence[Pair]) -> Pairs:
    """Returns pairs as the tokenised data set that `load_pairs` makes of rows."""
    columns = dict(zip(("chosen_ids", "rejected_ids", "chosen_prompt", "rejected_prompt", "shared", "encoder_ids"),
                       zip(*pairs, strict=True), strict=True))
    schema = pa.schema([TOKENISED.field(name) for name in columns])
    return Pairs(pa.table({name: list(column) for name, column in columns.items()}, schema), np.arange(len(pairs)))


def load_pairs(source: Source, pretrained: Pretrained, config: DataConfig) -> tuple[Pairs, dict[str, int]]:
    """Returns the tokenised pairs that are kept, and the counts of what was read, cut and dropped."""
    encoder = Encoder(pretrained.tokenizer, pretrained.stop_ids, config, pretrained.decoder_start)
    table = _tokenised(source, encoder)
    lost, identical, empty = (np.asarray(table[name]) for name in ("lost", "identical", "empty"))
    dropped = np.zeros(len(table), bool)
    if config.overlong == "error" and lost.any():
        first = int(np.asarray(table["index"])[lost > 0][0])
        raise ValueError(f"{source.where(first)}: the pair is longer than data.max_length ({config.max_length}); raise "
                         "it, or set data.overlong to 'truncate' or 'drop'")
    for policy, hit in ((config.overlong, lost > 0), (config.identical, identical), (config.empty, empty)):
        if policy == "drop":
            dropped |= hit
    keep = np.flatnonzero(~dropped)
    counts = {"rows": len(table), "identical": int(identical.sum()), "empty": int(empty.sum()),
              "overlong": int((lost > 0).sum()), "pairs": len(keep),
              "truncated": int((lost[keep] > 0).sum())}
    log.info("%s: %d rows; identical %d (%s), empty %d (%s), over-long %d (%s); %d pairs", source.name, counts["rows"],
             counts["identical"], config.identical, counts["empty"], config.empty, counts["overlong"], config.overlong,
             counts["pairs"])
    if not len(keep):
        raise ValueError(f"{source.name}: no pair is left to use, of {len(table)} rows")
    return Pairs(table, keep), counts


TOKENISED = pa.schema([
    ("index", pa.int64()), ("chosen_ids", pa.list_(pa.int32())), ("rejected_ids", pa.list_(pa.int32())),
    ("chosen_prompt", pa.int32()), ("rejected_prompt", pa.int32()), ("shared", pa.int32()),
    ("encoder_ids", pa.list_(pa.int32())), ("lost", pa.int32()), ("identical", pa.bool_()), ("empty", pa.bool_()),
])


class Job(NamedTuple):
    """All that a worker needs to tokenise any range of rows."""

    source: Source
    encoder: Encoder

    def __call__(self, rows: range) -> pa.RecordBatch:
        columns = self.source.rows[rows.start:rows.stop]
        texts, index = [], []
        for offset, i in enumerate(rows):
            row = {name: values[offset] for name, values in columns.items()}
            where = self.source.where(i)
            if set(row) == {JSON}:
                if not row[JSON].strip():
                    continue
                row = _parse(row[JSON], where)
            texts.append(render(split_prompt(row, where), self.encoder.template, where))
            index.append(i)
        pairs, lost = self.encoder(texts) if texts else ([], [])
        return pa.record_batch([
            index, *zip(*pairs, strict=True), lost, [t.identical for t in texts], [t.empty for t in texts],
        ] if texts else [[] for _ in TOKENISED], schema=TOKENISED)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None


_job: Job


def _start_worker(job: Job) -> None:
    global _job
    _job = job


def _run_job(rows: range) -> pa.RecordBatch:
    return _job(rows)


def _tokenised(source: Source, encoder: Encoder) -> pa.Table:
    """Returns the tokenised rows from the cache, which is keyed by rows, tokenizer and settings, or makes them."""
    tokenizer, config = encoder.tokenizer, encoder.config
    settings = [config.max_length, config.max_prompt_length, config.max_completion_length, config.truncation_mode,
                encoder.stop_ids, tokenizer.bos_token_id, encoder.decoder_start]
    key = _hash("2", source.hash, tokenizer.backend_tokenizer.to_str(), json.dumps(tokenizer.chat_template),
                json.dumps(settings))
    file = CACHE / "tokenised" / f"{key}.arrow"
    if not _readable(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{key}.{uuid.uuid4().hex}.tmp")  # several hosts may share a home
        try:
            _tokenise_to(temporary, source, encoder, config.dataset_num_proc or 1)
            temporary.rename(file)
        finally:
            temporary.unlink(missing_ok=True)
    with pa.memory_map(str(file)) as mapped:
        return pa.ipc.open_file(mapped).read_all()


def _readable(file: pathlib.Path) -> bool:
    try:
        with pa.memory_map(str(file)) as mapped:
            pa.ipc.open_file(mapped)
    except (OSError, pa.ArrowInvalid):  # not there, or damaged: it is made again
        return False
    return True


def _tokenise_to(file: pathlib.Path, source: Source, encoder: Encoder, num_proc: int) -> None:
    count = len(source.rows)
    ranges = [range(start, min(start + TOKENIZER_BATCH, count)) for start in range(0, count, TOKENIZER_BATCH)]
    job = Job(source, encoder)
    with contextlib.ExitStack() as stack:
        if num_proc > 1:  # spawned, not forked: JAX's threads do not survive a fork
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(
                num_proc, multiprocessing.get_context("spawn"), _start_worker, (job,)))
            batches = pool.map(_run_job, ranges)
        else:
            batches = map(job, ranges)
        writer = stack.enter_context(pa.ipc.new_file(str(file), TOKENISED))
        progress = stack.enter_context(Progress(f"tokenising {source.name}", count))
        for rows, batch in zip(ranges, batches, strict=True):
            writer.write_batch(batch)
            progress.advance(len(rows))


def check_tables(pairs: Pairs, vocab_size: int, max_positions: int, name: str) -> None:
    """Raises a ValueError for ids or positions past the model's tables: JAX would clamp them in silence."""
    if pairs.max_id() >= vocab_size:
        raise ValueError(f"{name}: token ids must be below the model's vocab_size ({vocab_size}), "
                         f"got {pairs.max_id()}; the tokenizer belongs to another model")
    longest = int(pairs.sequence_lengths().max())
    if longest > max_positions:
        raise ValueError(f"{name}: sequences must be at most the model's {max_positions} positions, got {longest} "
                         f"tokens; lower data.max_length to {max_positions}")
