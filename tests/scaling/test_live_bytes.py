"""Live bytes are those of the storages that exist, whatever the views of them."""

import torch

from moe.scaling.live_bytes import LiveBytes

KB = 1024


def test_counts_storages_once_and_forgets_them() -> None:
    with LiveBytes("cpu") as live:
        x = torch.zeros(256)
        view = x.view(16, 16)[3:]
        assert live.live == KB
        y = x + 1
        assert live.live == 2 * KB
        del x, y
        assert live.live == KB  # the view holds it
        del view
        assert live.live == 0
        assert live.peak == 2 * KB
        live.restart_peak()
        assert live.peak == 0


def test_temporaries_of_an_expression_count_in_the_peak() -> None:
    x = torch.zeros(256)
    with LiveBytes("cpu") as live:
        live.ignore([x])
        y = (x + 1) * 2
        assert (live.live, live.peak) == (KB, 2 * KB)
        y.resize_(512)
        assert live.live == 2 * KB


def test_a_layer_keeps_what_its_backward_needs() -> None:
    weight = torch.zeros(64, 64, requires_grad=True)
    x = torch.zeros(4, 64, requires_grad=True)
    with LiveBytes("cpu") as live:
        live.ignore([weight, x])
        y = torch.nn.functional.silu(x @ weight)
        pre_activation = y_bytes = 4 * 64 * 4
        assert live.live == pre_activation + y_bytes
        y.sum().backward()
        assert live.live == y_bytes + weight.nbytes + x.nbytes  # the gradients


def test_tags_nest_and_other_devices_do_not_count() -> None:
    with LiveBytes("meta") as live:
        real = torch.zeros(256)
        with live.tagged("outer"):
            a = torch.empty(256, device="meta")
            with live.tagged("inner"):
                b = torch.empty(512, device="meta")
            c = torch.empty(256, device="meta")
        assert live.live_by_tag == {"outer": 2 * KB, "inner": 2 * KB}
        del a, c
        assert live.live_by_tag == {"outer": 0, "inner": 2 * KB}
        assert live.live == b.nbytes
        assert real.sum() == 0
