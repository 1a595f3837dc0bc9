#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A network switch in user space that delays, slows down and loses frames, for kernels without tc netem (tools/cluster_test.py starts it).

Makes a device eth0 in each of the named network namespaces and passes frames between them until it is stopped, then says how many. The same seed loses the same
frames of the same traffic."""
import argparse
import ctypes
import fcntl
import heapq
import os
import random
import select
import signal
import struct
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
libc = ctypes.CDLL(None, use_errno=True)


def open_tap(namespace):
    """A device eth0 in that namespace; the descriptor works from everywhere."""
    with open(f"/run/netns/{namespace}") as place:
        if libc.setns(place.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP | IFF_NO_PI))
    return tap


class Switch:
    def __init__(self, taps, options):
        self.taps, self.delay, self.jitter, self.loss = taps, options.delay_ms / 1e3, options.jitter_ms / 1e3, options.loss
        self.seconds_per_byte = 8e-6 / options.rate_mbit if options.rate_mbit > 0 else 0.0
        self.sent = {tap: 0.0 for tap in taps}  # when the last byte of its node leaves
        self.random = random.Random(options.seed)
        self.home = {}  # address of a card -> the tap behind which it is
        self.waiting = []  # (due, number, tap, frame)
        self.number = self.lost = 0

    def take(self, tap):
        while True:
            try:
                frame = os.read(tap, 65536)
            except BlockingIOError:
                return
            self.home[frame[6:12]] = tap
            now = time.monotonic()
            leaves = self.sent[tap] = max(now, self.sent[tap]) + len(frame) * self.seconds_per_byte
            to = self.home.get(frame[0:6])
            for other in [to] if to is not None else [one for one in self.taps if one != tap]:
                self.number += 1
                if self.random.random() < self.loss:
                    self.lost += 1
                    continue
                due = leaves + max(0.0, self.delay + self.jitter * self.random.uniform(-1, 1))
                heapq.heappush(self.waiting, (due, self.number, other, frame))

    def deliver(self):
        while self.waiting and self.waiting[0][0] <= time.monotonic():
            _, _, tap, frame = heapq.heappop(self.waiting)
            try:
                os.write(tap, frame)
            except OSError:
                self.lost += 1  # the device is down, or full: as on a wire

    def run(self):
        while True:
            pause = max(0.0, self.waiting[0][0] - time.monotonic()) if self.waiting else None
            for tap in select.select(self.taps, [], [], pause)[0]:
                self.take(tap)
            self.deliver()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("namespaces", nargs="+")
    parser.add_argument("--delay-ms", type=float, default=0)
    parser.add_argument("--jitter-ms", type=float, default=0, help="the delay is off by as much, either way: frames overtake each other")
    parser.add_argument("--loss", type=float, default=0, help="share of frames that are lost, 0.01 for one in a hundred")
    parser.add_argument("--rate-mbit", type=float, default=0, help="megabits per second that each node may send, after which frames wait; 0: any")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    taps = [open_tap(namespace) for namespace in options.namespaces]
    switch = Switch(taps, options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("ready", flush=True)
    try:
        switch.run()
    finally:
        print(f"{switch.number} frames, {switch.lost} lost", flush=True)


if __name__ == "__main__":
    main()
