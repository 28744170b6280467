"""What loading and computing are weighed with."""

from rootcellar.engine.rates import Demand, Meter, Prefills


def test_what_one_store_took_says_nothing_of_another():
    meter = Meter()

    def speed(nbytes, seconds):
        lane = {"bytes": nbytes, "seconds": seconds, "queued_bytes": 0}
        return meter.rates({"host-device": lane, "storage-host": lane}, 1.0).storage.speed

    assert speed(100, 1.0) == 100
    meter.other_store()
    assert speed(100, 1.0) == 0
    assert speed(200, 11.0) == 10


def test_the_ends_of_hits_say_little_of_how_fast_prompts_are_computed():
    prefills = Prefills()
    assert prefills.speed == 0
    prefills.step(512, 50.0, ended=True)  # the first of a shape compiles
    for _ in range(3):
        prefills.step(512, 1.0, ended=False)
        prefills.step(488, 1.0, ended=True)
    assert prefills.speed == 500
    for _ in range(100):
        prefills.step(16, 0.25, ended=True)
    assert prefills.speed == 500
    for _ in range(15):
        prefills.step(200, 2.0, ended=True)
    assert prefills.speed == 100


def test_demand_is_what_a_little_more_room_would_have_kept():
    demand = Demand(1600)
    for i in range(20):
        demand.note(100, None, float(i))
        assert i > 14 or demand.longest == float("inf")
    assert 1e6 < demand.longest < float("inf")  # full, and nobody misses anything
    for i in range(20, 400):
        demand.note(100, (0.5 if i % 4 == 0 else 50.0) if i % 2 == 0 else None, float(i))
    # 25 tokens a second would have been kept by room for 100 more.
    assert 3.5 < demand.longest < 4.5
