"""How a call finds its implementation, and what it says when it finds none."""

import os
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


def test_families_without_an_implementation_choose_as_ever():
    with ek.using("triton"):
        assert ek.sample_kept_tokens(1, 4, 2, seed=0, device="cpu").shape == (1, 2)
    with ek.using("cuda"):
        ek.contrastive_loss(torch.ones(2, 4), torch.ones(2, 4), 1.0)
        with pytest.raises(NotImplementedError, match=r'using\("cuda"\) asked for cuda alone'):
            ek.sample_kept_tokens(1, 4, 2, seed=0, device="cpu")


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


def test_a_package_that_does_not_load_is_one_reason_among_others(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: no such symbol')")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-m", "evakernels"], capture_output=True, text=True, check=True, env=env)
    assert "is installed, but does not load: libtriton.so: no such symbol" in done.stdout


def test_doctor_reports_every_family():
    done = subprocess.run([sys.executable, "-m", "evakernels"], capture_output=True, text=True, check=True)
    assert "compiled library:" in done.stdout
    for family in dispatch.FAMILIES:
        assert f"\n{family}: " in done.stdout
    if not torch.cuda.is_available():
        assert f"\nnorm: cpu, reference: {dispatch.rules('norm', 'cpu')[0].reason}\n" in done.stdout
    for family in ("tokens", "lamb"):
        told = done.stdout.split(f"\n{family}: ")[1].split("\n    no triton: ")[1].split("\n")[0]
        assert told.endswith("without the compiled library plain PyTorch serves")
    assert "without" not in done.stdout.split("\ncontrastive: ")[1]


def order(family, capability, op="attention", tokens=64):
    """The implementations asked on a GPU of this capability, as `choose` asks them."""
    x = torch.empty(1, tokens, 1, 32)
    found = dispatch.rules(family, "cuda", capability)
    return next(rule.order for rule in found if rule.when is None or rule.when(op, x, x, x))


CUDA_FIRST, TRITON_FIRST = ("cuda", "triton", "reference"), ("triton", "cuda", "reference")


@pytest.mark.parametrize(
    ("capability", "tokens", "op", "expected"),
    [
        ((8, 0), 4096, "attention", CUDA_FIRST),
        ((8, 9), 4096, "attention", CUDA_FIRST),
        ((9, 0), 577, "attention", CUDA_FIRST),
        ((9, 0), 578, "attention", TRITON_FIRST),
        ((9, 0), 578, "attention_qkvpacked_backward", TRITON_FIRST),
        ((9, 0), 578, "apply_rope", CUDA_FIRST),
        ((10, 3), 578, "attention", TRITON_FIRST),
        ((12, 0), 578, "attention", CUDA_FIRST),  # has no wgmma
        ((7, 5), 64, "attention", ("reference",)),  # no kernel is compiled for it
    ],
)
def test_long_attention_goes_to_triton_where_its_products_are_faster(capability, tokens, op, expected):
    assert order("attention", capability, op, tokens) == expected
    assert order("norm", capability, op, tokens) == (expected if expected == ("reference",) else CUDA_FIRST)


def test_forward_and_backward_ask_in_the_same_order(monkeypatch):
    """Of every size the operators of a call are served by the same implementation, if it serves them at all."""
    asked, reference = [], dispatch.implementation("attention", "reference")
    monkeypatch.setattr(dispatch, "_rules", lambda family, device: dispatch.rules(family, "cuda", (9, 0)))
    monkeypatch.setattr(dispatch, "refusal", lambda *_: None)
    monkeypatch.setattr(dispatch, "implementation", lambda family, name: asked.append(name) or reference)
    for tokens in (577, 578):
        x = torch.ones(1, tokens, 1, 32, requires_grad=True)
        ek.attention(x, x, x).sum().backward()
        ek.attention_qkvpacked(torch.ones(1, tokens, 3, 1, 32, requires_grad=True)).sum().backward()
    assert asked == ["cuda"] * 4 + ["triton"] * 4


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("family", dispatch.FAMILIES)
def test_some_rule_always_matches_and_the_reference_is_asked_last(family, device):
    for capability in ((8, 0), (9, 0), (12, 0)) if device == "cuda" else (None,):
        *some, last = dispatch.rules(family, device, capability)
        assert last.when is None and all(rule.when and rule.words for rule in some)
        assert all(rule.order[-1] == "reference" and rule.reason for rule in (*some, last))
        assert {name for rule in (*some, last) for name in rule.order} <= {*dispatch.IMPLEMENTATIONS}


def test_what_was_tried_is_told_with_the_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "refusal", lambda family, name, *_: f"{name} is tired")
    with pytest.raises(NotImplementedError) as caught:
        ek.rms_norm(torch.ones(2, 4), torch.ones(4))
    message = str(caught.value)
    assert "(tried cpu, reference (PyTorch's fused CPU kernels go first;" in message
    assert all(f"\n  {name}: {name} is tired" in message for name in dispatch.IMPLEMENTATIONS)


def test_the_device_is_that_of_the_first_tensor_list_or_device():
    meta, cpu = torch.ones(1, device="meta"), torch.ones(1)
    for args in ((None, 1, meta, cpu), ([meta], cpu), ([], meta), (torch.device("meta"), cpu)):
        assert dispatch.device_of(args).type == "meta"
    assert dispatch.device_of((1, None)).type == "cpu"


CONTRACT = """attention attention_qkvpacked Rope2d apply_rope layer_norm rms_norm add_norm norm_add swiglu swiglu_norm
swiglu_norm_packed sample_kept_tokens gather_tokens patchify FusedLAMB contrastive_loss sigmoid_loss using nn native"""


@pytest.mark.parametrize("name", CONTRACT.split())
def test_contract_name_is_public(name):
    assert hasattr(ek, name)
    assert name in ek.__all__
