"""What loading and computing are weighed with."""

from rootcellar.engine.rates import Meter, Prefills


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
