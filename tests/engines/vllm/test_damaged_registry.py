"""A shared directory that is lost, damaged, locked or full: what is known goes on, and every change says why not."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.engines.vllm.frontend.admission import FrontEnd
from trimtab.errors import SteeringError
from trimtab.serving import registry as registry_module
from trimtab.serving import registry_store
from trimtab.serving.registry import ProbeRegistry, VectorRegistry
from trimtab.serving.registry_store import RegistryUnavailableError
from trimtab.sites import HookPoint, ModelSites, Site
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

MODEL = ModelSites(8, 2, frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(2)))


def vector(seed: int) -> SteeringVector:
    numbers = np.random.default_rng(seed).normal(size=(2, 8))
    return SteeringVector({Site(layer, HookPoint.POST_BLOCK): numbers[layer] for layer in range(2)})


CALM, JOY, FEAR = vector(1), vector(2), vector(3)

INLINE = {"post_block": {"0": [1.0] * 8}}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(registry_store, "LOCK_SECONDS", 0.05)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory of an earlier life, in which `joy` was registered."""
    directory = tmp_path / "shared"
    VectorRegistry({}, directory).add("joy", JOY)
    return directory


def blob(directory: Path) -> Path:
    return directory / f"{JOY.digest.hex()}.safetensors"


def remove(directory: Path) -> None:
    shutil.rmtree(directory)


def replace_by_a_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("a file")


def index_is(content: bytes) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / "index.json").write_bytes(content)

    return damage


def index_is_a_folder(directory: Path) -> None:
    (directory / "index.json").unlink()
    (directory / "index.json").mkdir()


def no_index(directory: Path) -> None:
    (directory / "index.json").unlink()


FAULTS: dict[str, Callable[[Path], None]] = {
    "removed": remove,
    "a file": replace_by_a_file,
    "index cut short": index_is(b'{"joy": "60'),
    "index empty": index_is(b""),
    "index a list": index_is(b"[]"),
    "index a number": index_is(b"7"),
    "index nested": index_is(b"[" * 100_000),
    "index no text": index_is(b"\xff\xfe\x00"),
    "index huge": index_is(b" " * (5 << 20)),
    "index a folder": index_is_a_folder,
    "index gone": no_index,
}

HEALED_BY_A_CHANGE = {"index gone"}


@pytest.mark.parametrize("fault", FAULTS)
def test_names_known_before_the_directory_was_damaged_go_on_and_the_log_says_so_once(
    directory: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    front_end = FrontEnd(MODEL, VectorRegistry({"calm": CALM}, directory))
    FAULTS[fault](directory)
    caplog.clear()
    for _ in range(5):
        for source in ("calm", "joy", INLINE):
            assert front_end.admit({"interventions": [{"kind": "add", "vector": source}]}) is not None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "TRIMTAB_REGISTRY_DIR" in said[0]
    assert "1 vectors known from before, and those of the start, go on from memory" in said[0]


@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in HEALED_BY_A_CHANGE])
def test_a_change_in_a_damaged_directory_is_refused_with_the_reason_and_loses_nothing(
    directory: Path, fault: str
) -> None:
    registry = VectorRegistry({"calm": CALM}, directory)
    FAULTS[fault](directory)
    for change in (lambda: registry.add("fear", FEAR), lambda: registry.remove("joy")):
        with pytest.raises(RegistryUnavailableError, match="TRIMTAB_REGISTRY_DIR"):
            change()
    assert registry.vectors() == {"calm": CALM, "joy": JOY}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_starts_with_a_damaged_directory_and_says_of_an_unknown_name_that_it_may_be_lost(
    directory: Path, fault: str
) -> None:
    FAULTS[fault](directory)
    front_end = FrontEnd(MODEL, VectorRegistry({"calm": CALM}, directory))
    for source in ("calm", INLINE):
        assert front_end.admit({"interventions": [{"kind": "add", "vector": source}]}) is not None
    said = "there is no vector" if fault in ("removed", "index gone") else "it may be lost: the registry directory"
    with pytest.raises(SteeringError, match=said) as caught:
        front_end.admit({"interventions": [{"kind": "add", "vector": "joy"}]})
    assert caught.value.field == "steering.interventions[0].vector"


@pytest.mark.parametrize("fault", ["removed", "index gone", "index cut short"])
def test_what_is_known_is_written_again_once_the_directory_can_hold_it(directory: Path, fault: str) -> None:
    registry = VectorRegistry({"calm": CALM}, directory)
    FAULTS[fault](directory)
    registry.vectors()
    if fault == "removed":
        directory.mkdir()
    (directory / "index.json").unlink(missing_ok=True)
    registry.add("fear", FEAR)
    assert registry.vectors() == {"calm": CALM, "joy": JOY, "fear": FEAR}
    assert VectorRegistry({}, directory).vectors() == {"joy": JOY, "fear": FEAR}


def another_content(directory: Path) -> None:
    FEAR.save(blob(directory))


def blob_is_a_folder(directory: Path) -> None:
    blob(directory).unlink()
    blob(directory).mkdir()


BLOB_FAULTS: dict[str, Callable[[Path], None]] = {
    "gone": lambda directory: blob(directory).unlink(),
    "another content": another_content,
    "cut short": lambda directory: os.truncate(blob(directory), 20),
    "empty": lambda directory: os.truncate(blob(directory), 0),
    "a folder": blob_is_a_folder,
}


@pytest.mark.parametrize("fault", BLOB_FAULTS)
def test_a_damaged_content_costs_its_own_name_alone_and_registering_it_again_cures_it(
    directory: Path, fault: str
) -> None:
    VectorRegistry({}, directory).add("fear", FEAR)
    knows = VectorRegistry({}, directory)
    BLOB_FAULTS[fault](directory)
    assert knows.vectors() == {"joy": JOY, "fear": FEAR}
    front_end = FrontEnd(MODEL, VectorRegistry({}, directory))
    assert front_end.admit({"interventions": [{"kind": "add", "vector": "fear"}]}) is not None
    with pytest.raises(SteeringError, match=rf"it may be lost: {JOY.digest.hex()}\.safetensors"):
        front_end.admit({"interventions": [{"kind": "add", "vector": "joy"}]})
    front_end.registry.add("calm", CALM)
    assert json.loads((directory / "index.json").read_text())["joy"] == JOY.digest.hex()  # not lost by the change
    if fault == "a folder":
        blob(directory).rmdir()
    assert front_end.registry.add("joy", JOY) == JOY.digest.hex()
    assert front_end.admit({"interventions": [{"kind": "add", "vector": "joy"}]}) is not None
    assert VectorRegistry({}, directory).vectors() == {"joy": JOY, "fear": FEAR, "calm": CALM}


def test_a_content_that_comes_back_is_found_again(directory: Path) -> None:
    kept = blob(directory).read_bytes()
    blob(directory).unlink()
    registry = VectorRegistry({}, directory)
    assert dict(registry.vectors()) == {}
    blob(directory).write_bytes(kept)
    assert registry.vectors() == {"joy": JOY}


def test_entries_of_an_index_that_are_not_ours_are_ignored_said_and_kept(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = {"joy": JOY.digest.hex(), "../x": JOY.digest.hex(), "number": 3, "short": "ab", "list": [1], "": None}
    (directory / "index.json").write_text(json.dumps(index))
    registry = VectorRegistry({"calm": CALM}, directory)
    assert registry.vectors() == {"calm": CALM, "joy": JOY}
    registry.vectors()
    assert sum("'../x'" in record.getMessage() for record in caplog.records) == 1
    registry.add("fear", FEAR)
    written = json.loads((directory / "index.json").read_text())
    assert {name: written[name] for name in ("../x", "number", "short", "list")} == {
        name: index[name] for name in ("../x", "number", "short", "list")
    }


def test_files_of_others_in_the_directory_are_left_alone_and_our_own_half_written_ones_go(directory: Path) -> None:
    FEAR.save(directory / "my-own.safetensors")
    orphan = directory / f"{FEAR.digest.hex()}.safetensors"
    FEAR.save(orphan)
    (directory / "partial-0123456789abcdef.json").write_text("{")
    (directory / "partial-0123456789abcdef.safetensors").write_text("{")
    registry = VectorRegistry({}, directory)
    registry.remove("joy")
    assert {path.name for path in directory.iterdir()} == {"my-own.safetensors", orphan.name, "index.json", "lock"}


def test_a_lock_that_a_living_process_holds_is_a_refusal_and_one_of_a_dead_process_is_free(directory: Path) -> None:
    registry = VectorRegistry({}, directory)
    with open(directory / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RegistryUnavailableError, match="another process has held its lock"):
            registry.add("fear", FEAR)
        assert registry.vectors() == {"joy": JOY}
    holder = "import fcntl, os, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); os._exit(1)"
    subprocess.run([sys.executable, "-c", holder, str(directory / "lock")], check=False)
    registry.add("fear", FEAR)
    assert registry.vectors() == {"joy": JOY, "fear": FEAR}


def test_a_lock_that_is_a_pipe_or_a_folder_is_a_refusal_and_nobody_waits_for_it(directory: Path) -> None:
    registry = VectorRegistry({}, directory)
    for make in (os.mkfifo, os.mkdir):
        (directory / "lock").unlink(missing_ok=True)
        make(directory / "lock")
        with pytest.raises(RegistryUnavailableError, match="its lock cannot be taken"):
            registry.add("fear", FEAR)
        assert registry.vectors() == {"joy": JOY}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["open", "replace", "fsync", "save"])
def test_a_directory_that_cannot_be_written_is_a_refusal_with_the_reason(
    directory: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    registry = VectorRegistry({}, directory)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as context:
        if call == "save":
            context.setattr(SteeringVector, "save", fail)
        else:
            context.setattr(registry_store.os, call, fail)
        with pytest.raises(RegistryUnavailableError) as caught:
            registry.add("fear", FEAR)
    assert os.strerror(number) in str(caught.value)
    assert registry.vectors() == {"joy": JOY}
    assert not list(directory.glob("partial-*"))
    registry.add("fear", FEAR)
    assert VectorRegistry({}, directory).vectors() == {"joy": JOY, "fear": FEAR}


def test_a_directory_that_may_not_be_read_leaves_the_known_names(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = VectorRegistry({"calm": CALM}, directory)
    with monkeypatch.context() as context:
        context.setattr(registry_store.os, "stat", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied")))
        assert registry.vectors() == {"calm": CALM, "joy": JOY}
        assert "denied" in registry.trouble("other")
    registry.add("fear", FEAR)
    assert registry.trouble("other") == ""


def test_every_change_is_seen_by_another_process_whatever_the_clock_and_the_file_system_do(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that stands still or goes back, and an index of the same length in the same inode."""
    one, two = VectorRegistry({}, directory), VectorRegistry({}, directory)
    monkeypatch.setattr(registry_store.time, "time_ns", lambda: 0)
    stamps = set()
    for number in range(20):
        one.add("joy", JOY if number % 2 else FEAR)
        assert two.vectors()["joy"] == (JOY if number % 2 else FEAR)
        stamps.add(os.stat(directory / "index.json").st_mtime_ns)
    assert len(stamps) == 20


def test_probes_have_a_directory_of_their_own_with_the_same_care(tmp_path: Path) -> None:
    probe = Probe.at(Site(1, HookPoint.POST_BLOCK), [1.0] * 8, 0.5)
    registry = ProbeRegistry({}, tmp_path / "probes")
    registry.add("anger", probe)
    index_is(b"{")(tmp_path / "probes")
    assert registry.vectors() == {"anger": probe}
    with pytest.raises(RegistryUnavailableError):
        registry.add("other", probe)


def test_a_default_may_name_what_the_server_was_started_with_alone(directory: Path) -> None:
    registry = VectorRegistry({"calm": CALM}, directory)
    FrontEnd(MODEL, registry, {"interventions": [{"kind": "add", "vector": "calm"}]})
    with pytest.raises(SteeringError, match=r"registered at run time and may change; give it at start"):
        FrontEnd(MODEL, registry, {"interventions": [{"kind": "add", "vector": "joy"}]})
