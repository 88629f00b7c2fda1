"""A slow, lossy link between two network namespaces, made of two TUN devices.

``python -m helpers.relay PID_A PID_B DELAY_MS LOSS SEED``, where processes A and B live in the namespaces

Every IP packet that enters one device leaves the other after the delay, or never, with probability LOSS. It stands in for
``tc netem`` where the kernel has none. Prints "ready" once the devices exist; the caller gives them addresses.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time

DEVICE = "link0"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI, _CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
_LARGEST_PACKET = 65536


def _open_device(pid: str) -> int:
    """A TUN device in the network namespace of a process; it goes away with this one."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    if libc.setns(place, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter the namespace of process {pid}")
    os.close(place)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


def main(first: str, second: str, delay_ms: str, loss: str, seed: str) -> None:
    devices = [_open_device(first), _open_device(second)]
    other = {devices[0]: devices[1], devices[1]: devices[0]}
    delay, lost, draw = float(delay_ms) / 1000, float(loss), random.Random(int(seed))
    waiting: list[tuple[float, int, int, bytes]] = []  # due, number (so that order is kept), device, packet
    number = 0
    print("ready", flush=True)
    while True:
        timeout = max(waiting[0][0] - time.monotonic(), 0.0) if waiting else 1.0
        for device in select.select(devices, [], [], timeout)[0]:
            packet = os.read(device, _LARGEST_PACKET)
            if draw.random() >= lost:
                number += 1
                heapq.heappush(waiting, (time.monotonic() + delay, number, other[device], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, device, packet = heapq.heappop(waiting)
            try:
                os.write(device, packet)
            except OSError:  # the device is not up yet, or its queue is full: a packet lost
                continue


if __name__ == "__main__":
    main(*sys.argv[1:])
