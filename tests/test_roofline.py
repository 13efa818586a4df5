"""The cost model against the figures it was derived from, and against what it must not do."""

import pytest
from stretchysnake_bench.roofline import DEVICES, find_device, pipe_clocks, predict

H100 = find_device("H100")
MIDDLE = 8 * 1569 * 1152  # elements of VideoMamba-Middle, batch 8, 8 frames of 224x224
# The scan's loop in instructions of a warp for 32 elements, 16 states.
FORWARD = {"MUFU": 19, "FFMA": 30, "FMUL": 41, "LDG": 11, "IADD3": 20, "STG": 1}


def issue(count):
    return {"issue": count}


def test_the_special_function_unit_bounds_sixteen_states():
    clocks = pipe_clocks(FORWARD, H100)
    assert clocks["special"] == 19 * 8 == max(clocks.values())  # four lanes for 32 threads
    assert clocks["issue"] == sum(FORWARD.values())
    assert clocks["single"] == 71
    assert clocks["integer"] == 40
    assert clocks["memory"] == 48


def test_float32_takes_two_clocks_on_a100_and_integer_multiplies_share_its_ports():
    assert pipe_clocks({"FFMA": 10}, find_device("A100"))["single"] == 20
    assert pipe_clocks({"FFMA": 10, "IMAD": 3}, H100)["single"] == 16
    assert pipe_clocks({"UIADD3": 2, "BRA": 1}, H100) == dict(
        pipe_clocks({}, H100), uniform=4.0, issue=3.0
    )


@pytest.mark.parametrize(
    ("clocks", "elements", "microseconds"),
    [
        (159, MIDDLE, 77),
        (162, 2 * MIDDLE, 158),
        (144 + 162, 2 * 1152 * (64 * 784 + 1), 1180),  # chunk-parallel, both phases
        (635 * 1.305 / 0.75, MIDDLE, 540),  # mamba-ssm: padded rows, three quarters of the peak
    ],
)
def test_ceilings(clocks, elements, microseconds):
    got = predict(H100, issue(clocks), elements, 0, warps=10**6)
    assert got.pipe_seconds == pytest.approx(1e-6 * microseconds, rel=0.02)
    assert got.bound == "issue"


def test_memory_floor():
    got = predict(H100, issue(1), MIDDLE, 8.8 * MIDDLE, warps=288)
    assert got.memory_seconds == pytest.approx(38e-6, rel=0.01)
    assert got.seconds == got.memory_seconds  # a loop of one instruction waits for memory


def test_few_warps_wait_for_latencies():
    # 576 warps on 528 quarters: a quarter with two needs 362 us, one with one 263 us.
    got = predict(H100, issue(162), 2 * MIDDLE, 0, warps=576)
    assert got.seconds == pytest.approx(362e-6, rel=0.01)
    # 72 warps that walk 50,177 tokens alone.
    got = predict(H100, issue(162), 2 * 1152 * (64 * 784 + 1), 0, warps=72)
    assert got.seconds == pytest.approx(8.4e-3, rel=0.01)
    assert got.seconds > 6 * got.pipe_seconds


def test_registers_limit_resident_warps():
    def seconds(registers):
        return predict(H100, issue(160), MIDDLE, 0, warps=10 * 528, registers=registers).seconds

    assert seconds(0) == seconds(64) < seconds(250)
    assert seconds(250) == pytest.approx(seconds(64) * 0.85 / 0.80)  # two warps of a quarter
    with pytest.raises(ValueError, match="predict: 600 registers"):
        seconds(600)


def test_more_warps_never_take_longer_than_the_peak_allows():
    for device in DEVICES:
        got = predict(device, pipe_clocks(FORWARD, device), MIDDLE, 8.8 * MIDDLE, 2304)
        assert got.seconds >= max(got.pipe_seconds, got.memory_seconds) > 0
        assert "us of special" in str(got)


def test_devices_are_found_by_their_kind():
    assert find_device("NVIDIA A100-SXM4-80GB").capability == "8.0"
    assert find_device("NVIDIA A10").capability == "8.6"
    assert find_device("NVIDIA H100 80GB HBM3") is H100
    with pytest.raises(ValueError, match="no figures for 'TPU v5', it has T4, A100"):
        find_device("TPU v5")
    with pytest.raises(ValueError, match="predict: 0 elements in 1 warps, takes positive numbers"):
        predict(H100, issue(1), 0, 0, 1)
