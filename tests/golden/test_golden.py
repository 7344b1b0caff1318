"""The jobs compute what they did when the record was written."""

import copy

import pytest

from tests.golden.jobs import JOBS, UPDATES, run_job
from tests.golden.record import RTOL, differences, fingerprint, load


def test_the_record_has_every_job_and_enough_updates():
    jobs = load()["jobs"]
    assert jobs.keys() == JOBS.keys()
    assert all(len(job["updates"]) >= UPDATES for job in jobs.values())


@pytest.mark.parametrize("name", JOBS)
def test_a_job_reproduces_the_record(name):
    record = load()
    exact = record["fingerprint"] == fingerprint()
    lines = differences(name, record["jobs"][name], run_job(name), exact=exact)
    shown = "\n".join(lines[:20])
    assert not lines, f"{len(lines)} numbers differ ({'bit for bit' if exact else RTOL}):\n{shown}"


@pytest.mark.parametrize(("exact", "change"), [(True, 1e-15), (False, 1e-4)])
def test_a_changed_number_is_named_with_both_values(exact, change):
    recorded = load()["jobs"]["gae"]
    found = copy.deepcopy(recorded)
    assert differences("gae", recorded, found, exact=exact) == []
    before = found["updates"][3]["objective/score"]
    found["updates"][3]["objective/score"] = now = before * (1 + change)
    expected = [f"gae, update 4, objective/score: recorded {before!r}, found {now!r}"]
    assert differences("gae", recorded, found, exact=exact) == expected


def test_a_metric_that_comes_or_goes_and_another_hash_are_differences():
    recorded = load()["jobs"]["gae"]
    found = copy.deepcopy(recorded)
    found["updates"][0]["new"] = 1.0
    del found["updates"][0]["objective/score"]
    found["sha256"] = "other"
    assert len(differences("gae", recorded, found, exact=True)) == 3
