"""`trimtab doctor`: as a user runs it, on this vLLM, on one that has changed, without one, and for a refused start."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from vllm_harness import run_scenario

from trimtab.demo import model_path
from trimtab.engines.vllm.patches.tables import TABLES
from trimtab.engines.vllm.settings.refusals import RULES
from trimtab.version import code_version

Done = subprocess.CompletedProcess[str]


def user(*arguments: str, folder: Path | None = None, before: str = "", **environment: str) -> Done:
    """The command in a process of its own, on a pipe; `before` it runs, and with `folder` first on the path."""
    code = f"import sys\n{before}\nfrom trimtab.cli import main\nraise SystemExit(main(sys.argv[1:]))"
    path = os.pathsep.join([*([str(folder)] if folder else []), *filter(None, sys.path)])
    clean = {name: value for name, value in os.environ.items() if name not in ("VLLM_PLUGINS", "COLUMNS")}
    return subprocess.run(
        [sys.executable, "-c", code, "doctor", *arguments],
        env=clean | {"PYTHONPATH": path} | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.vllm
class TestOnThisVllm:
    @pytest.fixture(scope="class")
    def plain(self) -> Done:
        return user("--why")

    @pytest.fixture(scope="class")
    def told(self) -> dict[str, Any]:
        done = user("--json", VLLM_LOGGING_LEVEL="DEBUG")  # what others log is no part of the output
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    def test_all_fits_and_the_exit_code_says_so(self, plain: Done, told: dict[str, Any]) -> None:
        assert plain.returncode == 0, plain.stderr[-2000:]
        assert "All fits" in plain.stdout
        assert (told["fits"], told["faults"], told["refused"]) == (True, [], None)

    def test_the_versions_are_those_that_are_installed(self, told: dict[str, Any]) -> None:
        assert told["versions"]["code of trimtab"] == code_version()
        assert told["versions"]["Python"] == platform.python_version()
        for name in ("torch", "transformers", "vllm"):
            assert told["versions"][name].partition("+")[0] == version(name).partition("+")[0]

    def test_every_patch_is_tried_and_says_what_it_is_for_and_until_when(self, told: dict[str, Any]) -> None:
        patches = {(patch["module"], patch["target"]): patch for patch in told["patches"]}
        assert set(patches) == {(row.module, row.target) for table in TABLES.values() for row in table}
        for patch in patches.values():
            assert patch["state"] in (("ready", "not needed") if patch["on"] else ("applied", "not needed"))
            assert (patch["reason"] is not None) == (patch["state"] == "not needed")
            assert patch["why"]
            assert patch["until"]
            assert "above" not in patch["until"]  # each row is read alone

    def test_vllm_sees_both_entry_points(self, told: dict[str, Any]) -> None:
        assert {group: value.partition(":")[0] for group, value in told["entry_points"].items()} == {
            "vllm.general_plugins": "trimtab.engines.vllm.plugin",
            "vllm.endpoint_plugins": "trimtab.engines.vllm.http.routes",
        }

    def test_what_is_refused_in_general_is_a_sentence_for_each_rule(self, told: dict[str, Any], plain: Done) -> None:
        assert told["refused_in_general"] == [rule.sentence for rule in RULES]
        shown = " ".join(plain.stdout.split())
        for rule in RULES:
            assert rule.sentence in shown

    def test_a_pipe_gets_lines_of_at_most_80_characters(self, plain: Done) -> None:
        assert max(map(len, plain.stdout.splitlines())) <= 80
        assert "\x1b" not in plain.stdout
        for table in TABLES.values():
            for row in table:
                assert row.target in plain.stdout
                assert row.module in plain.stdout


@pytest.mark.vllm
def test_a_patch_whose_target_has_changed_is_named_with_its_reason() -> None:
    outcome = run_scenario("doctor", "changed")
    told = outcome["changed"]
    unfit = {patch["target"]: patch["reason"] for patch in told["patches"] if patch["state"] == "does not fit"}
    assert (told["code"], told["fits"]) == (1, False)
    assert "EngineCore.preprocess_add_request is gone" in unfit.pop("EngineCore.preprocess_add_request")
    assert "takes (self, something_else), not (self, scheduler_output" in unfit.pop("GPUModelRunner._prepare_inputs")
    assert "is there already" in unfit.pop("WorkerBase.trimtab_status")
    for target in ("OutputProcessor.add_request", "RequestState.make_request_output", "AsyncLLM.generate"):
        assert "vllm.v1.engine.output_processor" in (reason := unfit.pop(target))
        assert "cannot be imported" in reason
    assert unfit == {}
    assert "vLLM 0.40.1 is not supported: versions 0.26 to 0.33 are" in told["faults"]
    assert len(told["faults"]) == 6
    assert outcome["theirs"] == "theirs"


@pytest.mark.vllm
def test_what_an_engine_with_these_flags_would_be_refused_for_is_all_listed() -> None:
    outcome = run_scenario("doctor", "flags")
    told = {name: case["refused"] for name, case in outcome.items() if name != "log"}
    for name, reasons in told.items():
        assert outcome[name]["code"] == int(bool(reasons)), reasons
        assert outcome[name]["faults"] == reasons
    assert told.pop("none") == told.pop("fine") == []
    expected = {
        "modes": ["cpu_offload_gb", "kv_transfer_config"],
        "modes and settings": ["cpu_offload_gb", "steering.layers: layers [4, 5, 6, 7, 8, 9] do not exist"],
        "rows": ["steering.max_rows: Input should be greater than or equal to 3"],
        "a file": ["steering.vectors.calm: /nowhere.gguf cannot be loaded"],
        "a default": ["'nobody'"],
        "a flag": ["--steering-colour"],
        "slots": ["steering.kinds: is given without slots"],
        "a kind": ["no kind 'clmap' (did you mean 'clamp'?)"],
        "a value": ["'sideways'"],
        "no steering": ["vLLM makes no configuration of this"],
    }
    assert set(told) == set(expected)
    for name, parts in expected.items():
        assert len(told[name]) == len(parts), told[name]
        for reason, part in zip(told[name], parts, strict=True):
            assert part in reason


@pytest.mark.vllm
def test_a_machine_without_a_device_and_a_process_that_leaves_trimtab_out() -> None:
    """vLLM's own wheel is built for CUDA, and without the tests' platform it knows no device here."""
    done = user("--model", str(model_path()), "--json", VLLM_PLUGINS="somebody,else", CUDA_VISIBLE_DEVICES="")
    told = json.loads(done.stdout)
    assert (done.returncode, told["refused"]) == (1, [])
    assert told["faults"] == [
        "VLLM_PLUGINS is 'somebody,else' and leaves trimtab out, so vLLM does not load it: name trimtab in it"
    ]


NO_VLLM = "sys.modules['vllm'] = None"


def test_without_vllm_it_says_so_and_tells_of_the_other_engine() -> None:
    done = user(before=NO_VLLM)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = " ".join(done.stdout.split())
    assert "vLLM is not installed" in shown
    assert "The Transformers engine steers without it" in shown
    assert "vllm not installed" in shown
    assert "install trimtab with its extra `vllm`" in shown
    for rule in RULES:
        assert rule.sentence in shown
    told = json.loads(user("--json", before=NO_VLLM).stdout)
    assert (told["fits"], told["vllm"], told["versions"]["vllm"], told["patches"]) == (True, None, None, [])


def test_without_vllm_no_engine_is_said_to_be_fine() -> None:
    done = user("--model", str(model_path()), before=NO_VLLM)
    assert done.returncode == 1
    assert "All fits" not in done.stdout
    assert "install trimtab with its extra `vllm`" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("raise RuntimeError('libcuda.so is not here')", "RuntimeError: libcuda.so is not here"),
        ("import a_library_of_theirs", "No module named 'a_library_of_theirs'"),
    ],
)
def test_a_vllm_that_cannot_be_imported_is_not_called_missing(tmp_path: Path, code: str, fault: str) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(code)
    done = user(folder=tmp_path)
    assert done.returncode == 1
    assert f"vLLM cannot be imported: {fault}" in " ".join(done.stdout.split())
    assert "vLLM is not installed" not in done.stdout


def test_flags_of_an_engine_without_a_model_are_refused() -> None:
    done = user("--tensor-parallel-size", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "trimtab: --tensor-parallel-size: flags of an engine need --model\n"
