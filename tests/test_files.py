"""Files from elsewhere meet limits before they fill memory or time; files of ours are replaced whole or not at all."""

import gzip
import io
import os
import stat
import threading
import zipfile

import numpy as np
import pytest

from numbabuf import files
from numbabuf.demand import DemandModel
from numbabuf.errors import TraceError
from numbabuf.tools.cli import main
from numbabuf.traces import read_trace

READERS = [(read_trace, TraceError), (DemandModel.load, ValueError)]
HEADER = b"arrival_ms,prompt,output\n"


def packed(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def one_line(caught):
    return "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize(("read", "error"), READERS)
def test_a_fifo_or_a_device_is_refused_and_not_waited_for(tmp_path, read, error):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, "/dev/zero"):
        with pytest.raises(error, match="not a regular file") as caught:
            read(path)
        assert one_line(caught) and str(path) in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_nothing_but_a_regular_file_is_replaced(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            DemandModel().save(path)
    assert stat.S_ISFIFO(fifo.stat().st_mode) and list(tmp_path.iterdir()) == [fifo]


@pytest.mark.parametrize("zeros", [100 << 20])
@pytest.mark.parametrize("kind", ["gzip", "npz"])
def test_a_small_file_that_expands_to_very_much_is_refused(tmp_path, capsys, kind, zeros):
    path = tmp_path / "bomb"
    if kind == "gzip":
        path.write_bytes(gzip.compress(HEADER + bytes(zeros)))
    else:
        path.write_bytes(packed(num_tokens=np.zeros(zeros // 8, np.int64), num_seqs=np.zeros(1, np.int64)))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(TraceError, match="expand to more than 33,554,432") as caught:
        read_trace(path)
    assert one_line(caught)
    assert main(["plan", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_text_that_compresses_well_is_read(tmp_path):
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(HEADER + b"1,2,3\n" * 100_000))
    assert len(read_trace(path)) == 100_000


def test_a_claim_of_more_than_there_is_fills_no_memory(tmp_path):
    """An array of which the header says 2**40 elements, and of which there are none."""
    whole = io.BytesIO()
    np.lib.format.write_array_header_1_0(whole, {"descr": "<i8", "fortran_order": False, "shape": (1 << 40,)})
    path = tmp_path / "claim.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("num_tokens", "num_seqs"):
            archive.writestr(f"{name}.npy", whole.getvalue())
    for read, error in READERS:
        with pytest.raises(error) as caught:
            read(path)
        assert one_line(caught)


def test_compressed_twice_says_so(tmp_path):
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(gzip.compress(HEADER + b"1,2,3\n")))
    with pytest.raises(TraceError, match="compressed twice"):
        read_trace(path)


def test_a_step_of_very_many_sequences_is_refused(tmp_path):
    path = tmp_path / "steps.npz"
    path.write_bytes(packed(num_tokens=np.array([100_000_000]), num_seqs=np.array([100_000_000])))
    with pytest.raises(TraceError, match=r"num_seqs\[0\]: whole numbers from 1 to 1e\+06"):
        read_trace(path)


def test_every_truncation_of_a_model_is_refused(tmp_path):
    path = tmp_path / "model.json"
    DemandModel(seen=[(0.0, 3), (1.0, 9)]).save(path)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"model\.json") as caught:
            DemandModel.load(path)
        assert one_line(caught)


def test_a_link_stays_a_link_and_what_it_names_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "model.json", tmp_path / "link.json"
    link.symlink_to(target)
    for size in (3, 9):  # the second replaces what the first made
        DemandModel(seen=[(0.0, size)]).save(link)
        assert link.is_symlink() and DemandModel.load(target).seen == ((0.0, size),)
    assert sorted(tmp_path.rglob("*.json")) == [target, link]


@pytest.mark.skipif(os.name == "nt", reason="no such modes here")
def test_a_private_file_stays_private(tmp_path):
    path = tmp_path / "model.json"
    DemandModel().save(path)
    path.chmod(0o600)
    DemandModel().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_save_that_fails_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "model.json"
    DemandModel(seen=[(0.0, 3)]).save(path)
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        DemandModel(seen=[(0.0, 9)]).save(path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError) as caught:
        DemandModel().save(tmp_path / "none" / "model.json")
    assert caught.value.filename == str(tmp_path / "none" / "model.json")


def together(*works):
    """Run functions in threads that begin at once; what they raised."""
    raised, begin = [], threading.Barrier(len(works))

    def run(work):
        begin.wait()
        try:
            work()
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_threads_that_save_to_one_path_leave_a_whole_model_at_every_moment(tmp_path):
    path = tmp_path / "model.json"
    models = [DemandModel(seen=[(0.0, size)] * 1000) for size in (3, 9)]
    models[0].save(path)
    found = set()

    def save(model):
        for _ in range(30):
            model.save(path)

    def load():
        for _ in range(30):
            found.update(DemandModel.load(path).histogram()[0].tolist())

    assert together(*(lambda model=model: save(model) for model in models), load) == []
    assert found <= {3, 9} and list(tmp_path.iterdir()) == [path]


def test_a_model_is_saved_and_read_while_threads_learn(tmp_path):
    model = DemandModel(window=512)

    def learn(first):
        for at in range(1500):
            model.observe(1 + (first + at * at) % 5000)
            if at % 50 == 0:
                model.forecast(4)

    def look():
        for number in range(40):
            model.save(tmp_path / f"{number % 2}.json")
            assert len(DemandModel.load(tmp_path / f"{number % 2}.json")) <= 512
            assert len(model.seen) <= 512 and model.histogram()[1].sum() <= 512

    assert together(lambda: learn(0), lambda: learn(7), look) == []
    assert len(model) == 512
