"""Text as a SeqIO Task, and chunks that stream from a TFDS dataset."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from hyper_t5 import pipeline
from hyper_t5.data.process_share import process_share
from hyper_t5.data.vocab import EOS_ID
from hyper_t5.tasks import text
from hyper_t5.tasks.seqio_tasks import seqio, tf, tfds
from hyper_t5.tasks.text import TfdsChunks, Units
from hyper_t5.utils.errors import UserError
from tests.support.toy_tasks import BYTES, text_config


def test_text_files_are_a_seqio_task(tmp_path: Path) -> None:
    documents = ["short", "the quick brown fox " * 30]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    name = text.register(str(path), BYTES)
    assert name.startswith("text_a_")
    task = seqio.get_mixture_or_task(name)
    rows = task.get_dataset({"targets": 50}, split="train", shuffle=False).as_numpy_iterator()
    expected = [[*BYTES.encode(document)[:49], EOS_ID] for document in documents]
    assert [row["targets"].tolist() for row in rows] == expected
    with pytest.raises(UserError, match=r"data\.text is empty"):
        pipeline.make_sampler(text_config(""), BYTES)


# ------------------------------------------------------------------------------- TFDS

DOCUMENTS = [f"document number {i:03d} " * (1 + i % 7) for i in range(47)] + ["tiny"]


def build_tfds(folder: Path, documents: list[str], shards: int, field: str = "text") -> Any:
    """Prepare `small_text:1.0.0` with documents in their order; return its builder."""
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class SmallText(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = folder
            code_path = epath.Path(__file__)  # else TFDS derives it with importlib_resources

            def _info(self) -> Any:
                features = tfds.features.FeaturesDict({field: tfds.features.Text()})
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=True
                )

            def _split_generators(self, dl_manager: Any) -> Any:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Any:
                yield from enumerate({field: d} for d in documents)

    builder = SmallText(data_dir=folder)
    download_config = tfds.download.DownloadConfig(num_shards=shards)
    builder.download_and_prepare(download_config=download_config)
    return builder


def log_reads(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list that receives [begin, end, documents read] of every call of read_blocks."""
    reads: list[list[int]] = []
    read_blocks = text.read_blocks

    def logged(builder: Any, begin: int, end: int, block: int) -> Iterator[np.ndarray]:
        entry = [begin, end, 0]
        reads.append(entry)
        for texts in read_blocks(builder, begin, end, block):
            entry[2] += len(texts)
            yield texts

    monkeypatch.setattr(text, "read_blocks", logged)
    return reads


def decoded(chunks: TfdsChunks, first: int, count: int) -> list[str]:
    return [BYTES.decode(ids) for ids in chunks.chunks(first, count)]


def test_batches_of_a_tfds_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = build_tfds(tmp_path, DOCUMENTS, shards=4)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = text_config("tfds:small_text:1.0.0")
    sampler, same = (pipeline.make_sampler(config, BYTES) for _ in range(2))
    batches = [sampler.batch(step) for step in range(6)]
    for step in (5, 3):
        np.testing.assert_array_equal(same.batch(step)["inputs"], batches[step]["inputs"])
    for spec, message in [
        ("tfds:no_such_set:1.0.0", r"tfds:no_such_set.*TFDS_DATA_DIR"),
        ("tfds:small_text", r"data\.text='tfds:small_text'.*named with a version"),
        ("tfds:small_text/1.0.0", r"data\.text='tfds:small_text/1.0.0'.*named with a version"),
    ]:
        config.data.text = spec
        with pytest.raises(UserError, match=message):
            pipeline.make_sampler(config, BYTES)
    # A file is damaged after the dataset was prepared.
    config.data.text = "tfds:small_text:1.0.0"
    file = sorted(builder.data_path.glob("*tfrecord*"))[2]
    raw = file.read_bytes()
    for damaged, message in [
        (raw[: len(raw) // 2], "cannot be read"),
        (b"", "was expected to contain 12"),
    ]:
        file.write_bytes(damaged)
        stream = pipeline.train_batches(pipeline.make_sampler(config, BYTES))
        with pytest.raises(UserError, match=rf"small_text/1\.0\.0 .*{message}"):
            list(itertools.islice(stream, 8))


@pytest.mark.parametrize("in_memory", [10**6, 0])
@pytest.mark.parametrize(("shards", "draws"), [(4, 4), (1, 4), (4, 1), (2, 8)])
def test_an_epoch_has_every_document_once(
    shards: int, draws: int, in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "MAX_IN_MEMORY", in_memory or 5 * draws)
    reads = log_reads(monkeypatch)
    builder = build_tfds(tmp_path, DOCUMENTS, shards)
    chunks = TfdsChunks(builder, BYTES, 512, 1, draws, block=5)
    epochs = [decoded(chunks, epoch * 48, 48) for epoch in range(2)]
    assert epochs[0] != epochs[1]
    for epoch in epochs:  # a neighbor replaces the document that is too short
        assert set(epoch) == set(DOCUMENTS[:-1])
        assert len(epoch) == 48
    assert sum(count for *_, count in reads) == (48 if in_memory else 96), "read more than once"
    for first in (60, 11):
        resumed = TfdsChunks(builder, BYTES, 512, 1, draws, block=5)
        assert decoded(resumed, first, 20) == (epochs[0] + epochs[1])[first : first + 20]


@pytest.mark.parametrize(
    ("lengths", "wanted", "size", "starts", "left_out"),
    [
        ([12, 12, 12], 3, 12, [0, 12, 24], 0),
        ([12, 13, 12], 2, 12, [0, 12, 25], 1),
        ([12, 13], 8, 3, [0, 3, 6, 9, 12, 15, 18, 21], 1),
        ([100, 100, 1, 100], 2, 1, range(301), 0),
        ([100, 100, 3, 100], 2, 100, [0, 100, 203], 3),
        ([0, 10, 0, 20], 2, 10, [0, 10, 20], 0),
        ([2], 256, 1, [0, 1], 0),
    ],
)
def test_units(lengths: list[int], wanted: int, size: int, starts: Any, left_out: int) -> None:
    units = Units(lengths, wanted)
    assert (units.size, units.starts.tolist(), units.left_out) == (size, list(starts), left_out)


def test_the_number_of_streams_divides_the_draws_of_a_step(tmp_path: Path) -> None:
    builder = build_tfds(tmp_path, DOCUMENTS, 2)
    for draws, streams in ((8, 8), (512, 256), (300, 150), (257, 1)):
        assert TfdsChunks(builder, BYTES, 512, 1, draws)._streams == streams


def test_unusable_datasets_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builder = build_tfds(tmp_path / "a", ["x"], 1, field="body")
    with pytest.raises(UserError, match=r"small_text/1\.0\.0 has no field text; its fields are"):
        TfdsChunks(builder, BYTES, 512, 1)
    builder = build_tfds(tmp_path / "b", ["short"] * 3, 1)
    with monkeypatch.context() as patch:
        patch.setattr(text, "read_blocks", lambda *_: iter(()))
        with pytest.raises(UserError, match="fewer documents in a file than in its dataset_info"):
            TfdsChunks(builder, BYTES, 512, 1).chunks(0, 1)
    with pytest.raises(UserError, match="no document of a whole block has 16 tokens"):
        TfdsChunks(builder, BYTES, 512, 1).chunks(0, 1)
    # Where every unit is one document, another unit's replaces one that is too short.
    builder = build_tfds(tmp_path / "c", ["short", "long enough " * 3, "tiny"], 1)
    assert decoded(TfdsChunks(builder, BYTES, 512, 1, 3), 0, 3) == ["long enough " * 3] * 3
    builder = build_tfds(tmp_path / "d", DOCUMENTS[:11], 1)
    assert capsys.readouterr().out.count("never read") == 0
    TfdsChunks(builder, BYTES, 512, 1, 4)
    assert "1 of small_text/1.0.0's 11 documents are never read" in capsys.readouterr().out


C4_SHARD = 356_317  # documents in each of C4's 1024 files, about


def mocked_c4(folder: Path) -> Any:
    """Return a context in which C4 has TFDS's metadata and documents that name their number."""
    dataset_dir = folder / "c4" / "en" / "3.1.0"
    dataset_dir.mkdir(parents=True)
    lengths = [str(C4_SHARD + i % 3) for i in range(1024)]
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split = {"name": "train", "shardLengths": lengths, "filepathTemplate": template}
    info = {"name": "c4", "version": "3.1.0", "fileFormat": "tfrecord", "splits": [split]}
    (dataset_dir / "dataset_info.json").write_text(json.dumps(info))

    def as_dataset(self: Any, split: Any, **_: Any) -> Any:
        [part] = split.to_absolute(self.info.splits)
        numbers = tf.data.Dataset.range(part.from_, part.to)
        return numbers.map(
            lambda i: {"text": tf.strings.join(["document number ", tf.strings.as_string(i)])}
        )

    return tfds.testing.mock_data(
        policy=tfds.testing.MockPolicy.USE_FILES, data_dir=str(folder), as_dataset_fn=as_dataset
    )


@pytest.mark.parametrize("streams", [8, 4])
def test_a_process_reads_only_its_share_of_c4(
    streams: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "MAX_IN_MEMORY", 4 * streams)
    monkeypatch.setattr(text, "MAX_STREAMS", streams)
    reads = log_reads(monkeypatch)
    config = text_config("tfds:c4/en:3.1.0", tasks_per_batch=8, chunk_length=64)
    far = 123_456_789  # a run may resume at any step
    with mocked_c4(tmp_path):
        whole = pipeline.make_sampler(config, BYTES)
        batches = {step: whole.batch(step) for step in (0, 1, 2, 3, 4, 5, far)}
        assert len(reads) == 2 * streams, "a stream seeks in consecutive steps"
        reads.clear()
        for count in (2, 4, 8)[: streams // 3 + 1]:
            files_read = []
            for process in range(count):
                sampler = pipeline.make_sampler(config, BYTES)
                share = process_share(8, process, count)
                for step in (2, 3, 4, 5, far):
                    part = sampler.batch(step, process, count)
                    for key, value in batches[step].items():
                        np.testing.assert_array_equal(part[key], value[share.start : share.stop])
                assert len(reads) == 2 * streams // count
                # Four consecutive steps read at most so many documents in blocks of 4.
                assert all(documents <= (8 if streams == 8 else 12) for *_, documents in reads)
                files_read.append({begin // C4_SHARD for begin, *_ in reads})
                reads.clear()
            assert sum(map(len, files_read)) == len(set.union(*files_read)), "a file is read twice"
