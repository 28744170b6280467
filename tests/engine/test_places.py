"""The queue's places: what is known of a full one before a call is read, and that nobody is refused for ever."""

import pytest
from machines import Callers, hash_machine

import rootcellar
from rootcellar.engine.commands import Abandon, Abort, Pause
from rootcellar.errors import QueueFull, RequestTooLarge

LONG = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}


def full_machine():
    """One request may run and four of a tenant wait; five of ``callers`` are there, none of which runs."""
    callers = Callers(hash_machine(running=1, max_queued=4))
    callers.do(Pause("in_place"))
    callers.do(callers.submit([[1, 2, 3]] * 4, 1, max_new_tokens=4))
    callers.do(callers.submit([[1, 2, 3]], 2, max_new_tokens=4))
    return callers


def refused(callers, call):
    with pytest.raises(QueueFull, match="1 more, and there is room for 0"):
        callers.do(callers.submit([[4, 5]], call, max_new_tokens=4)).result()


def test_a_full_queue_is_known_from_the_first_refusal_on_and_to_its_tenant_alone():
    callers = full_machine()
    places = callers.machine.places
    places.require_known("", 1)
    refused(callers, 3)
    with pytest.raises(QueueFull, match="there is room for 0"):
        places.require_known("", 1)
    places.require_known("another", 1)
    places.require_known("", 100)  # which is too much whenever it comes: another error, made elsewhere
    with pytest.raises(RequestTooLarge, match="max_queued_requests"):
        callers.do(callers.submit([[4, 5]] * 6, 4, max_new_tokens=4)).result()


@pytest.mark.parametrize("way", ["ended by a command", "computed", "failed"])
def test_whoever_was_refused_is_let_in_when_there_is_room_again(way):
    """Whatever makes it: nobody who was refused has to send a command before it is seen."""
    callers = full_machine()
    machine = callers.machine
    refused(callers, 3)
    match way:
        case "ended by a command":
            callers.do(Abandon(1))
        case "computed":
            machine.paused = False
            while machine.ready:
                machine.step()
        case "failed":
            machine.recover(RuntimeError("nobody knows whose step it was"))
    machine.places.require_known("", 1)


def test_a_stale_refusal_ends_with_the_engines_work(tiny_folder):
    with rootcellar.Engine(
        model_path=tiny_folder, max_total_tokens=1024, max_running_requests=1, max_queued_requests=2
    ) as engine:
        stream = engine.generate(input_ids=[[1]] * 3, sampling_params=LONG, stream=True)
        next(stream)
        with pytest.raises(QueueFull):
            engine.generate(input_ids=[2], sampling_params=LONG)
        stream.close()
        assert engine.generate(input_ids=[2], sampling_params={**LONG, "max_new_tokens": 1})["output_ids"]


def test_others_have_their_turn_between_the_pieces_of_a_large_call_that_was_given_up(tiny_folder):
    """What is asked for after it need not wait until all of it has ended."""
    with rootcellar.Engine(model_path=tiny_folder, max_total_tokens=1024) as engine:
        engine.pause_generation("in_place")
        stream = engine.generate(input_ids=[[1]] * 100, sampling_params=LONG, stream=True)
        waiting = []
        engine._loop.call(lambda: (stream.close(), waiting.append(engine._loop.ask(left(engine)))))
        assert 0 < waiting[0].result() < 100
        assert engine.continue_generation() is None


def left(engine):
    return lambda: len(engine._loop.machine.trackers)


def test_what_is_given_up_while_the_engine_ends_is_no_trouble(tiny_folder):
    engine = rootcellar.Engine(model_path=tiny_folder, max_total_tokens=1024)
    engine.pause_generation("in_place")
    stream = engine.generate(input_ids=[[1]] * 3, sampling_params=LONG, stream=True)
    call = engine._loop.machine.roster.of(None)[0].request.call
    engine.shutdown()
    engine._loop._end_some(call)  # as the last words of its thread would
    assert {result["meta_info"]["finish_reason"]["cause"] for result in stream_results(stream)} == {"shutdown"}


def stream_results(stream):
    """The last word on each."""
    results = []
    while True:
        try:
            results.append(next(stream))
        except rootcellar.errors.GenerationFailed as error:
            return [*results, *error.results]
        except StopIteration:
            return results


def test_aborting_by_name_makes_room_too():
    callers = full_machine()
    refused(callers, 3)
    callers.do(Abort("c1", None, "asked"))
    callers.machine.places.require_known("", 1)
