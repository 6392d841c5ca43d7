"""How a call finds its implementation, and what it says when it finds none."""

import subprocess
import sys

import pytest
import torch

import evakernels as ek
from evakernels import dispatch


def test_refusal_lists_every_implementation_with_its_reason():
    with ek.using("cuda"), pytest.raises(NotImplementedError) as caught:
        ek.rms_norm(torch.ones(2, 4), torch.ones(4))
    message = str(caught.value)
    assert 'using("cuda") asked for cuda alone' in message
    assert all(f"\n  {name}: " in message for name in dispatch.IMPLEMENTATIONS)
    assert "python -m evakernels" in message


def test_using_restores_what_was_asked_before():
    with ek.using("reference"):
        with ek.using("cuda"), pytest.raises(NotImplementedError):
            ek.rms_norm(torch.ones(2, 4), torch.ones(4))
        ek.rms_norm(torch.ones(2, 4), torch.ones(4))
    assert dispatch._forced is None


def test_unknown_implementation_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'fpga'.*'cuda', 'triton', 'cpu', 'reference'"), ek.using("fpga"):
        pass


@pytest.mark.parametrize("family", dispatch.FAMILIES)
def test_every_family_has_a_reference(family):
    assert not isinstance(dispatch.implementation(family, "reference"), str)


def test_an_implementation_refuses_in_its_own_words(monkeypatch):
    cpu = dispatch.implementation("norm", "cpu")
    monkeypatch.setattr(cpu, "refuses", lambda op, *args: "it is tired", raising=False)
    with ek.using("cpu"), pytest.raises(NotImplementedError, match="cpu: it is tired"):
        ek.layer_norm(torch.ones(2, 4), torch.ones(4))
    ek.layer_norm(torch.ones(2, 4), torch.ones(4))  # without being forced, the next one serves


def test_doctor_reports_every_family():
    done = subprocess.run([sys.executable, "-m", "evakernels"], capture_output=True, text=True, check=True)
    assert "compiled library:" in done.stdout
    for family in dispatch.FAMILIES:
        assert f"\n{family}: " in done.stdout


CONTRACT = """attention attention_qkvpacked Rope2d apply_rope layer_norm rms_norm add_norm norm_add swiglu swiglu_norm
swiglu_norm_packed sample_kept_tokens gather_tokens patchify FusedLAMB contrastive_loss sigmoid_loss using nn native"""


@pytest.mark.parametrize("name", CONTRACT.split())
def test_contract_name_is_public(name):
    assert hasattr(ek, name)
    assert name in ek.__all__
