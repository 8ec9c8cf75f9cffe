import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, for subprocesses too: tiny models only lose by threads
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is: kernels run on the CPU, as Python


def shares_a_fixture(item: pytest.Item) -> bool:
    """Whether a test uses a fixture of a whole module, which every worker that runs such a test would build."""
    definitions = [found for name in item.fixturenames for found in item._fixtureinfo.name2fixturedefs.get(name, ())]
    return any(definition.scope == "module" for definition in definitions)


@pytest.hookimpl(tryfirst=True)  # xdist's own hook reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups the tests that share a module's fixtures: under `--dist=loadgroup` one worker runs a group.

    Tests that start several processes at once are all in the group "processes", by their own mark: two such tests at
    the same time would wait for each other's processes, and run into their timeouts.
    """
    for item in items:
        if shares_a_fixture(item) and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuses a pytest under which xdist leaves the groups out: it marks a test of a group by an @ in its id."""
    if session.config.getoption("dist", "no") == "loadgroup" and hasattr(session.config, "workerinput"):
        for item in session.items:
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
                raise pytest.UsageError(f"{item.nodeid} is in no group: see the versions in requirements-dev.txt")
