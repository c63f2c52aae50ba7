"""Targets and the doctor: what a machine lacks is said before the work, and what is said is true."""

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from compress import doctor
from compress.target import Target, available_cores

LIGHT = ("compress.target", "compress.doctor", "compress.runtimes", "compress.measure", "exporters")


@pytest.mark.parametrize("module", LIGHT)
def test_importing_starts_nothing_heavy(module):
    heavy = ("torch", "transformers", "onnxruntime", "datasets")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"device": "tpu"}, {"dtype": "int3"}, {"sequnce": 128}])
def test_wrong_fields_are_refused(wrong):
    with pytest.raises(ValidationError):
        Target(**wrong)


@pytest.mark.parametrize(("device", "runtime"), [("cpu", "onnxruntime"), ("cuda", "torch")])
def test_auto_chooses_by_device(device, runtime):
    assert Target(device=device).chosen == runtime
    assert Target(device=device, runtime="torch").chosen == "torch"


def test_threads_beyond_the_machine_are_a_problem():
    assert Target().problems() == []
    more = len(available_cores()) + 1
    (problem,) = Target(threads=more).problems()
    assert problem.startswith(f"threads: {more} asked")


def test_missing_gpu_is_a_problem(monkeypatch):
    monkeypatch.setattr("compress.target.graphics_cards", list)
    assert any(problem.startswith("device: 'cuda'") for problem in Target(device="cuda").problems())


def test_missing_runtime_names_the_package(monkeypatch):
    monkeypatch.setattr("compress.target.find_spec", lambda name: None)
    (problem,) = Target(runtime="onnxruntime").problems()
    assert "pip install 'hf-compress'" in problem


def test_fingerprint_is_json_and_tells_targets_apart():
    first, second = Target().fingerprint(), Target(threads=2).fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert first != second
    assert Target(runtime="onnxruntime").fingerprint() == first


@pytest.mark.parametrize(
    ("flags", "cards", "pays"),
    [
        (["avx2", "avx512f", "avx512_vnni"], {}, False),
        (["avx512_bf16"], {}, True),
        (["amx_bf16"], {}, True),
        (["amx_bf16"], {"0: T4": 7.5}, False),
        ([], {"0: A100": 8.0}, True),
        ([], {"0: A100": 8.0, "1: V100": 7.0}, False),
    ],
)
def test_bfloat16_pays_only_in_hardware(monkeypatch, flags, cards, pays):
    monkeypatch.setattr(doctor, "machine", lambda: {"flags": flags})
    monkeypatch.setattr(doctor, "gpus", lambda: cards)
    assert doctor.bf16_pays() is pays


@pytest.mark.parametrize(("flags", "faster"), [(["avx512_vnni"], True), (["avx_vnni"], True), (["avx2"], False)])
def test_int8_follows_the_dot_products(monkeypatch, flags, faster):
    here = {"processor": "x", "cores": 1, "memory_gib": 8, "versions": {}, "flags": flags}
    monkeypatch.setattr(doctor, "machine", lambda: here)
    (finding,) = [finding for finding in doctor.examine() if finding.what == "int8"]
    assert ("2-4x" in finding.meaning) is faster
    assert finding.meaning in str(finding)
