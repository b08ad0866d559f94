"""The front end's vector registry, alone and shared between processes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import SteeringError
from trimtab.serving import registry as module
from trimtab.serving.registry import ReadOnlyNameError, VectorRegistry
from trimtab.sites import HookPoint, Site
from trimtab.vectors.content import VectorMetadata
from trimtab.vectors.dose import stream_norm, stream_norm_key
from trimtab.vectors.vector import SteeringVector


def vector(seed: int) -> SteeringVector:
    numbers = np.random.default_rng(seed).normal(size=(2, 8))
    return SteeringVector({Site(layer, HookPoint.POST_BLOCK): numbers[layer] for layer in range(2)})


CALM, JOY, FEAR = vector(1), vector(2), vector(3)


@pytest.fixture(params=["alone", "shared"])
def registry(request, tmp_path: Path) -> VectorRegistry:
    return VectorRegistry({"calm": CALM}, tmp_path / "shared" if request.param == "shared" else None)


def test_start_vectors_are_there_and_held_by_workers(registry: VectorRegistry):
    assert dict(registry.vectors()) == {"calm": CALM}
    assert registry.held_by_workers(CALM.digest)
    assert not registry.held_by_workers(JOY.digest)


def test_a_name_can_be_added_replaced_and_removed(registry: VectorRegistry):
    assert registry.add("joy", JOY) is None
    assert registry.add("joy", FEAR) == JOY.digest.hex()
    assert registry.vectors()["joy"] == FEAR
    assert registry.remove("joy") == FEAR.digest.hex()
    assert "joy" not in registry.vectors()
    with pytest.raises(KeyError):
        registry.remove("joy")


def test_a_name_of_the_start_can_be_neither_replaced_nor_removed(registry: VectorRegistry):
    for change in (
        lambda: registry.add("calm", JOY),
        lambda: registry.add("calm", CALM),
        lambda: registry.remove("calm"),
    ):
        with pytest.raises(ReadOnlyNameError, match="'calm' belongs to the start of this server"):
            change()
    assert dict(registry.vectors()) == {"calm": CALM}
    assert [(entry.content, entry.at_start, entry.read_only) for entry in registry.entries()] == [(CALM, True, True)]


def test_a_name_of_the_start_means_what_the_flags_say_whatever_the_directory_holds_from_an_earlier_life(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    VectorRegistry({}, tmp_path).add("calm", JOY)
    server = VectorRegistry({"calm": CALM}, tmp_path)
    assert dict(server.vectors()) == {"calm": CALM}
    assert f"where it stands for {CALM.digest.hex()}: that of the start counts" in caplog.text
    server.add("fear", FEAR)  # and the other server's name is not lost by it
    assert VectorRegistry({}, tmp_path).vectors() == {"calm": JOY, "fear": FEAR}
    (tmp_path / "index.json").write_text(
        '{"calm": null}'
    )  # what an earlier release wrote for a name deleted at run time
    assert dict(VectorRegistry({"calm": CALM}, tmp_path).vectors()) == {"calm": CALM}


def test_the_same_content_under_a_new_name_needs_no_second_copy_at_the_workers(registry: VectorRegistry):
    registry.add("serene", CALM)
    assert [entry.at_start for entry in registry.entries()] == [True, True]


def test_a_mapping_handed_out_never_changes(registry: VectorRegistry):
    before = registry.vectors()
    registry.add("joy", JOY)
    assert set(before) == {"calm"}
    assert registry.vectors() is not before
    assert registry.vectors() is registry.vectors()


@pytest.mark.parametrize("name", ["", "-x", "a/b", "a b", "x" * 129, "a\n", None, 3, "ä", "../x"])
def test_a_name_that_cannot_stand_in_a_url_is_refused(registry: VectorRegistry, name):
    with pytest.raises(SteeringError) as caught:
        registry.add(name, JOY)
    assert caught.value.field == "name"


def test_a_full_registry_refuses_a_new_name_but_not_a_replacement(registry: VectorRegistry, monkeypatch):
    monkeypatch.setattr(module, "MAX_REGISTERED", 2)
    registry.add("a", JOY)
    registry.add("b", JOY)
    with pytest.raises(SteeringError, match="registered already"):
        registry.add("c", JOY)
    registry.add("a", FEAR)
    registry.remove("b")
    registry.add("c", JOY)
    assert set(registry.vectors()) == {"a", "c", "calm"}


def test_two_processes_that_share_a_directory_see_each_others_names(tmp_path: Path):
    one, two = VectorRegistry({"calm": CALM}, tmp_path), VectorRegistry({"calm": CALM}, tmp_path)
    one.add("joy", JOY)
    assert two.vectors()["joy"] == JOY
    two.add("joy", FEAR)
    assert one.vectors()["joy"] == FEAR
    late = VectorRegistry({"calm": CALM}, tmp_path)
    assert dict(late.vectors()) == {"calm": CALM, "joy": FEAR}
    one.remove("joy")
    assert set(two.vectors()) == set(late.vectors()) == {"calm"}


def test_content_that_no_name_uses_is_deleted_from_the_directory(tmp_path: Path):
    registry = VectorRegistry({}, tmp_path)
    registry.add("a", JOY)
    registry.add("b", JOY)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    registry.remove("a")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    registry.remove("b")
    assert not list(tmp_path.glob("*.safetensors"))


WRITER = """
import sys
import numpy as np
from pathlib import Path
from trimtab.serving.registry import VectorRegistry
from trimtab.vectors.content import VectorMetadata
from trimtab.vectors.dose import stream_norm, stream_norm_key
from trimtab.vectors.vector import SteeringVector
registry = VectorRegistry({}, Path(sys.argv[1]))
for number in range(20):
    registry.add(f"{sys.argv[2]}-{number}", SteeringVector({(0, "post_block"): [float(number), float(sys.argv[3])]}))
    if number % 2:
        registry.remove(f"{sys.argv[2]}-{number - 1}")
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name, str(number)])
        for number, name in enumerate(["a", "b"])
    ]
    reader = VectorRegistry({}, tmp_path)
    while any(writer.poll() is None for writer in writers):
        for name, content in reader.vectors().items():
            assert content.block[0, 0] == float(name.split("-")[1])
    assert [writer.wait() for writer in writers] == [0, 0]
    assert set(reader.vectors()) == {f"{name}-{number}" for name in "ab" for number in range(1, 20, 2)}


def test_a_directory_keeps_nothing_of_what_streams_were_measured(tmp_path: Path) -> None:
    """It knows vectors by the digest of their numbers, so a dose of one could be taken with the norms of another."""
    site = Site(1, HookPoint.POST_BLOCK)
    extra = {stream_norm_key(site): "10.0", "pairs": "8"}
    vector = SteeringVector({site: [3.0, 4.0]}, VectorMetadata(method="mean", extra=extra))
    shared, sibling, own = VectorRegistry({}, tmp_path), VectorRegistry({"start": vector}, tmp_path), VectorRegistry({})
    for registry in (shared, own):
        registry.add("calm", vector)
    assert stream_norm(own.vectors()["calm"], site) == 10.0
    assert stream_norm(sibling.vectors()["start"], site) == 10.0
    for registry in (shared, sibling, VectorRegistry({}, tmp_path)):
        kept = registry.vectors()["calm"]
        assert (stream_norm(kept, site), kept.digest, kept.metadata.extra["pairs"]) == (None, vector.digest, "8")
