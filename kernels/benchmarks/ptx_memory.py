"""The memories of the PTX emulator: bounds, alignment, and counts of the traffic."""

import bisect
import dataclasses

import numpy as np
from stretchysnake_bench.ptx_decode import PtxError

SECTOR = 32  # bytes, the smallest unit that moves between the L2 cache and HBM
BANKS, BANK_BYTES = 32, 4
# Beyond 32 bits, so that a truncated address shows; 128 is what XLA aligns buffers to.
FIRST_ADDRESS = 0x7F00_0000_0080
SPACING = 256


@dataclasses.dataclass
class Traffic:
    """Bytes that a run moved between the threads and one array.

    Attributes:
      read, written: bytes that threads asked for.
      unique_read, unique_written: bytes of the 32-byte sectors touched at least once; what HBM
        moves where the caches hold everything else.
      requested_read, requested_written: bytes of the sectors touched by each warp instruction, a
        sector counted once an instruction; what moves between the L1 cache and the registers.
    """

    read: int = 0
    written: int = 0
    unique_read: int = 0
    unique_written: int = 0
    requested_read: int = 0
    requested_written: int = 0


@dataclasses.dataclass
class SharedTraffic:
    """Accesses to shared memory.

    Attributes:
      requests: warp instructions.
      passes: rounds that these took, at most one word of each bank a round.
      conflicts: rounds beyond those that the number of bytes needs.
    """

    requests: int = 0
    passes: int = 0
    conflicts: int = 0


class GlobalMemory:
    """All arrays of a run in one row of bytes, with gaps between them."""

    def __init__(self, machine, arrays):
        self.machine = machine
        unique = {id(array): array for array in arrays}  # one buffer may be input and output
        self.arrays = list(unique.values())
        self.slots = [list(unique).index(id(array)) for array in arrays]
        self.starts, self.ends = [], []
        address = FIRST_ADDRESS
        for k, array in enumerate(self.arrays):
            if not array.flags.c_contiguous:
                raise ValueError(f"{machine.name}: array {k} is not C-contiguous")
            self.starts.append(address)
            self.ends.append(address + array.nbytes)
            address += (array.nbytes // SPACING + 2) * SPACING
        self.base = FIRST_ADDRESS - 128
        data = np.zeros(-(-(address - self.base) // SPACING) * SPACING, np.uint8)
        for start, array in zip(self.starts, self.arrays, strict=True):
            at = start - self.base
            data[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
        self.views = {1 << k: data.view(f"u{1 << k}") for k in range(4)}
        self.traffic = [Traffic() for _ in self.arrays]
        self.touched = {kind: np.zeros(data.size // SECTOR, bool) for kind in ("read", "written")}
        self._bounds = np.array(self.starts), np.array(self.ends)

    def index(self, address, size, writes, text):
        """Returns the places of `address` in the row, in bytes, and counts the access.

        Args:
          address: (threads,) int64, of the active threads.
          size: bytes that a thread accesses, a power of two.
          writes: whether it is a store.
          text: the instruction, for the message.

        Raises:
          PtxError: an address out of every array or misaligned, or a store to a read-only array.
        """
        low, high = int(address.min()), int(address.max())
        which = bisect.bisect_right(self.starts, low) - 1
        if which >= 0 and high + size <= self.ends[which] and low >= self.starts[which]:
            owners = [(which, slice(None))]
        else:
            owner = np.searchsorted(self._bounds[0], address, "right") - 1
            outside = owner < 0
            outside |= address + size > self._bounds[1][owner]
            if outside.any():
                self._refuse("outside of every array", address, np.argmax(outside), text)
            owners = [(int(k), owner == k) for k in np.unique(owner)]
        if int(np.bitwise_or.reduce(address)) & (size - 1):
            bad = np.argmax(address & (size - 1) != 0)
            self._refuse(f"not a multiple of {size}", address, bad, text)
        kind = "written" if writes else "read"
        place = address - self.base
        sector = place // SECTOR
        self.touched[kind][sector] = True
        for k, part in owners:
            if writes and not self.arrays[k].flags.writeable:
                raise PtxError(f"{self.machine.name}: '{text}' stores to array {k}, read-only")
            self._count(self.traffic[k], kind, sector[part], size, part)
        return place

    def _count(self, traffic, kind, sector, size, part):
        rows = np.full(self.machine.size, -1, np.int64)
        mask = self.machine.mask
        if mask is None:
            rows[part] = sector
        else:
            rows[np.flatnonzero(mask)[part]] = sector
        rows = np.sort(rows.reshape(-1, 32), axis=1)
        different = np.count_nonzero(rows[:, 1:] != rows[:, :-1]) + np.count_nonzero(
            rows[:, 0] >= 0
        )
        setattr(traffic, kind, getattr(traffic, kind) + sector.size * size)
        name = f"requested_{kind}"
        setattr(traffic, name, getattr(traffic, name) + different * SECTOR)

    def _refuse(self, why, address, at, text):
        """Raises with the nearest array below the address."""
        machine, bad = self.machine, int(address[at])
        active = np.arange(machine.size) if machine.mask is None else np.flatnonzero(machine.mask)
        k = max(0, bisect.bisect_right(self.starts, bad) - 1)
        near = "there are no arrays"
        if self.arrays:
            near = f"{bad - self.starts[k]} bytes after the start of array {k}"
            near += f", which has {self.arrays[k].nbytes}"
        raise PtxError(
            f"{machine.name}: '{text}' at an address {why} in {machine.place(active[at])}: {near}"
        )

    def copy_back(self):
        """Writes what the kernel stored to the arrays."""
        for start, array in zip(self.starts, self.arrays, strict=True):
            if array.flags.writeable:
                at = start - self.base
                array.reshape(-1).view(np.uint8)[:] = self.views[1][at : at + array.nbytes]

    def report(self) -> list[Traffic]:
        """Returns the traffic of each array given."""
        for start, end, traffic in zip(self.starts, self.ends, self.traffic, strict=True):
            sectors = slice((start - self.base) // SECTOR, -(-(end - self.base) // SECTOR))
            traffic.unique_read = int(self.touched["read"][sectors].sum()) * SECTOR
            traffic.unique_written = int(self.touched["written"][sectors].sum()) * SECTOR
        return [self.traffic[slot] for slot in self.slots]


class SharedMemory:
    """The shared memories of all programs, one after another, set to NaN."""

    def __init__(self, machine, programs, threads, size):
        self.machine, self.size = machine, size
        stride = -(-size // 128) * 128
        data = np.full(programs * stride, 0xFF, np.uint8)
        self.views = {1 << k: data.view(f"u{1 << k}") for k in range(4)}
        self.offset = np.repeat(np.arange(programs), threads) * stride
        self.traffic = SharedTraffic()

    def index(self, address, size, writes, text, lanes=32):
        """As `GlobalMemory.index`; `lanes` addresses of each warp are given."""
        machine = self.machine
        active = np.arange(machine.size) if machine.mask is None else np.flatnonzero(machine.mask)
        active = active[active % 32 < lanes]
        for why, bad in (
            (f"outside of its {self.size} bytes", (address < 0) | (address + size > self.size)),
            (f"not a multiple of {size}", address & (size - 1) != 0),
        ):
            if bad.any():
                at = np.argmax(bad)
                raise PtxError(
                    f"{machine.name}: '{text}' at an address {why} of shared memory in "
                    f"{machine.place(active[at])}: {int(address[at])}"
                )
        self._count(address, size, active // 32)
        return address + self.offset[active]

    def _count(self, address, size, warp):
        """Counts rounds: lanes of 8 or 16 bytes go in halves or quarters of a warp."""
        words = max(1, size // BANK_BYTES)
        lane_group = BANKS // words
        first = np.r_[0, np.flatnonzero(np.diff(warp)) + 1]
        position = np.arange(len(warp)) - np.repeat(first, np.diff(np.r_[first, len(warp)]))
        phase = warp * 32 + position // lane_group
        word = (address // BANK_BYTES)[:, None] + np.arange(words)
        keys = np.unique(np.stack([np.repeat(phase, words), word.reshape(-1)]), axis=1)
        load = np.unique(keys[0] * BANKS + keys[1] % BANKS, return_counts=True)
        phases, start = np.unique(load[0] // BANKS, return_index=True)
        passes = int(np.maximum.reduceat(load[1], start).sum())
        self.traffic.requests += len(first)
        self.traffic.passes += passes
        self.traffic.conflicts += passes - len(phases)
