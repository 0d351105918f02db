"""What can be left out, what it costs, and that it is so."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import detachnet
from detachnet.errors import CheckpointError, CutError
from detachnet.selection.candidate import Candidate
from detachnet.selection.costs import counted
from detachnet.selection.space import CANDIDATE, Space
from detachnet.surgery.enlarging import enlarged
from tests.searched import SIZE, everything, space_of_tiny, trained


def test_a_step_of_a_group_is_one_that_saves_something() -> None:
    space = space_of_tiny()
    cost = counted(space, "macs")
    assert space.groups == ["stem.0", "one.inner", "two.inner"]
    assert space.spans == ["stem:one", "one:two"]
    # Of 16 channels as many as a multiple of 8 stay: seven and six eighths are all of them.
    half = space.after(Candidate(), "one.inner", cost)
    assert half == Candidate(eighths=(("one.inner", 5),))
    assert space.after(half, "one.inner", cost) is None


def test_spans_that_touch_are_one() -> None:
    space = space_of_tiny()
    cost = counted(space, "macs")
    one = space.after(Candidate(), "one:two", cost)
    assert one is not None
    both = space.after(one, "stem:one", cost)
    assert both == Candidate(("stem:two",))
    assert space.after(both, "one:two", cost) is None
    # Filters of a block that is left out save nothing.
    assert space.after(both, "one.inner", cost) is None
    assert space.after(both, "stem.0", cost) is not None


@pytest.mark.parametrize("drop", [(), ("one:two",)])
def test_the_macs_that_are_promised_are_those_of_the_detached_model(drop: tuple[str, ...]) -> None:
    space = space_of_tiny()
    cost = counted(space, "macs")
    for eighths in ({"stem.0": 4}, {"stem.0": 4, "one.inner": 4, "two.inner": 4}):
        candidate = Candidate(drop).with_widths(eighths)
        alone = space.family(candidate).detach(CANDIDATE)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            alone(torch.zeros(1, *SIZE))
        assert counter.get_total_flops() // 2 == cost(candidate)
        num_params = sum(parameter.numel() for parameter in alone.parameters())
        assert counted(space, "bytes")(candidate) == 4 * num_params


@pytest.mark.slow
def test_the_smallest_is_the_smallest() -> None:
    space = space_of_tiny()
    for by in ("macs", "bytes"):
        cost = counted(space, by)  # type: ignore[arg-type]
        least = cost(space.smallest(cost))
        assert least == min(cost(candidate) or 0 for candidate in everything(space, cost))


@pytest.mark.slow
def test_filters_at_both_ends_of_a_span_go_together() -> None:
    """In a chain without skip connections: what is before the span then goes into what was behind it."""
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.25)
    space = Space(detachnet.make_detachable(model, {}, (3, 32, 32), check="none"))
    cost = counted(space, "macs")
    wide = space.after(Candidate(), "features.2:features.5", cost)
    assert wide is not None
    assert space.after(wide, "features.3", cost) is None
    narrow = space.after(wide, "features.0", cost)
    assert narrow is not None
    assert narrow.widths == {"features.0": 5, "features.3": 5}
    kept = space.sub_model(narrow).kept
    assert kept["features.0"] == kept["features.3"]
    assert space.plan(narrow) is not None
    # The other way round: what was narrowed before is narrowed at both ends.
    assert space.tied(Candidate(("features.2:features.5",), (("features.3", 4),))).widths == {
        "features.0": 4,
        "features.3": 4,
    }


def test_shared_norms_have_no_widths() -> None:
    assert Space(trained("shared")).groups == []


def test_what_a_family_had_stays_bit_for_bit() -> None:
    net = trained()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    more = enlarged(net, {"narrow": detachnet.SubModel(width=0.5, filters="important")})
    assert more.names == ("base", "short", "narrow")
    assert more.plan["short"] == net.plan["short"]
    assert all(torch.equal(value, more.state_dict()[name]) for name, value in before.items())
    images = torch.randn(2, *SIZE)
    for name in net.names:
        assert torch.equal(net(images, which=name), more(images, which=name))


@pytest.mark.slow
def test_another_one_of_the_same_name_takes_nothing_of_it() -> None:
    net = enlarged(trained(), {"it": detachnet.SubModel(width=0.5, filters="important")})
    with torch.no_grad():
        for value in net.norms.parameters():
            value.add_(1)
    again = enlarged(net, {"it": detachnet.SubModel(width={"stem.0": 0.5}, filters="important")}, ("short",))
    assert again.names == ("base", "short", "it")
    for name, value in again.norms.it.named_parameters():
        assert torch.equal(value, again.own_tensor(f"norms.it.{name}", net.base.get_parameter(name)))


def test_a_new_sub_model_has_no_untrained_layer() -> None:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    net = detachnet.make_detachable(model, {}, (3, 32, 32), check="none")
    with pytest.raises(CutError, match=r"sub would need a new layer in place of 'features.2:features.9'"):
        enlarged(net, {"sub": detachnet.SubModel(drop=["features.2:features.9"])})
    with pytest.raises(CutError, match="the family has a model 'base' already"):
        enlarged(net, {"base": detachnet.SubModel(width=0.5)})


def test_a_candidate_is_a_text_and_back() -> None:
    candidate = Candidate(("a:b",), (("c", 3),))
    assert Candidate.of_key(candidate.key) == candidate
    with pytest.raises(CheckpointError, match="is no candidate"):
        Candidate.of_key("[]")
